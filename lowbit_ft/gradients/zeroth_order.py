"""kind: zeroth_order. No backward: the slope of the loss along random directions (ZeroQAT, arXiv 2509.00031,
Eq. 2-3; QZO, arXiv 2505.13430, on scales).

    d_i = (L(theta + S u_i) - L(theta - S u_i)) / 2        two forwards, no gradient, the same micro-batches
    G   = 1/n sum d_i u_i / S                              E[G] = the gradient of the smoothed loss

S is diagonal, one number per tensor: eps grid steps over what one step is for that tensor (Adapter.one_step).
So eps counts what counts: a code flips with a probability of about 0.8 eps, those next to a boundary first.
Far below a step none does and d is the noise of clipping and scales; near one the loss is of another model
(W2 g64, tiny Llama: 2.59 becomes 6.57 at 0.5 and 2.60 at 0.05, LOG.md). Without a residual every weight lies
half a step from its boundaries: small steps then move scales alone.

The processes exchange two numbers per probe (the summed losses) and make the same directions. Nothing is
saved for a backward: memory is the base, what trains (once more while it is moved), and one layer. G is not
clipped: its norm is that of a random direction, whatever the slope. With `momentum` an average of G over the
steps is kept, which begins with the first one.

ZeroQAT's other parts are choices of quant: its learnable clipping (Eq. 5) is activations.learn, and the
scales of every adapter; its smoothing (Eq. 4) is quant.smooth, before packing. Its own code does not train s
in the loop either; per group of inputs, which is what a frozen grid could take in, kind: group does more
(LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..adapters import is_scale
from ..adapters.attach import adapted_layers
from ..adapters.base import Adapter
from ..adapters.carry import Carried, followed
from .base import Gradient, Making, Window, zeros
from .config import GradientConfig
from .directions import DISTRIBUTIONS, direction, moved, same_draws
from .refusals import Problem, fp32_masters, no_warmup


class ZerothOrderConfig(GradientConfig):
    backward: ClassVar[bool] = False
    clips: ClassVar[bool] = False
    estimates: ClassVar[bool] = True
    whole: ClassVar[bool] = True

    kind: Literal["zeroth_order"] = "zeroth_order"
    probes: Annotated[int, Field(ge=1)] = Field(
        default=1, description="directions per step, of two forwards each"
    )
    eps: Annotated[float, Field(gt=0)] = Field(
        default=0.05, description="how far along a direction, in grid steps: all weights at once, and rounded"
    )
    distribution: Literal["normal", "uniform", "rademacher", "triangular", "logistic"] = Field(
        default="normal", description="of the numbers of a direction"
    )
    scope: Literal["adapters", "scales"] = Field(
        default="adapters",
        description="what trains: all tensors of the adapters, or their scales alone (QZO: with "
        "adapter.method: scale the same)",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="of an average of the estimates, kept beside what trains; 0: none is kept"
    )

    def build(self, making: Making) -> Gradient:
        return ZerothOrder(self, making)

    def problems(self, recipe: Any) -> Iterator[Problem]:
        yield from super().problems(recipe)
        train = recipe.train
        if train.gradient_checkpointing:
            yield (
                ("train", "gradient_checkpointing"),
                "got true, but gradient.kind: zeroth_order keeps nothing for a backward; set it to false",
            )
        if train.keep_codes:
            yield (
                ("train", "keep_codes"),
                "got true, but gradient.kind: zeroth_order moves the weights between any two forwards, so "
                "no codes are used twice; set it to false",
            )
        if train.mixed_precision == "fp16":
            yield (
                ("train", "mixed_precision"),
                "got 'fp16', whose loss scaler is for a backward, and gradient.kind: zeroth_order has none; "
                "set bf16 or no",
            )
        if "learning_rate" not in train.model_fields_set:
            yield (
                ("train", "learning_rate"),
                "got auto, which was searched with backprop: gradient.kind: zeroth_order needs a rate of its "
                "own, the smaller the more numbers train; set one, for example 2e-3",
            )
        if train.max_grad_norm != 1.0:
            yield (
                ("train", "max_grad_norm"),
                f"got {train.max_grad_norm:g}, but gradient.kind: zeroth_order clips nothing: the norm of an "
                "estimate is that of a random direction; remove it",
            )
        adapter, inputs = getattr(recipe, "adapter", None), getattr(recipe, "quant", None)
        learns = inputs is not None and inputs.activations is not None and inputs.activations.learn
        # Without quant nobody knows what of the inputs learns; then the model says it (ZerothOrder).
        trains = learns or inputs is None or getattr(adapter, "trains_scales", True)
        if self.scope == "scales" and adapter is not None and not trains:
            yield (
                ("train", "gradient", "scope"),
                f"got 'scales', but {adapter.method} trains none here; set scope: adapters, or a method that "
                "trains its scales (adapter.train_scale: true)",
            )
        if adapter is not None and adapter.ternary:
            yield (
                ("train", "gradient", "kind"),
                f"got 'zeroth_order', which moves by small amounts, and the numbers of adapter "
                f"{adapter.method} are -1, 0 and 1; set kind: backprop",
            )
        if self.scope == "scales" and adapter is not None and adapter.dense_delta:
            yield (
                ("train", "gradient", "scope"),
                f"got 'scales' with adapter {adapter.method}, whose dense part would be held and never "
                "trained; set adapter.method: scale, or scope: adapters",
            )
        if self.scope == "scales" and self.cage is not None:
            yield (
                ("train", "gradient", "cage"),
                "got a pull of what moves codes beside scope: scales, which trains nothing that does; remove "
                "cage, or set scope: adapters",
            )
        yield from no_warmup(recipe, "gradient.kind: zeroth_order")
        yield from fp32_masters(recipe, "gradient.kind: zeroth_order")

    @property
    def masters(self) -> int:
        return 4

    @property
    def kept(self) -> int:
        return 4 if self.momentum else 0

    def told(self, checkpointing: bool) -> str | None:
        share = 2 * self.probes / 3
        return (
            f"gradient zeroth_order: {2 * self.probes} forwards and no backward, about {share:.2f} of the "
            "time of a step by backprop; it needs many more steps"
        )


class ZerothOrder(Gradient):
    def __init__(self, config: ZerothOrderConfig, making: Making):
        self.config, self.making = config, making
        chosen = {n: p for n, p in making.trained.items() if config.scope == "adapters" or is_scale(n)}
        if not chosen:
            raise ValueError(
                "train.gradient.scope: got 'scales', but no scale trains; set adapter.train_scale: true, or "
                "scope: adapters"
            )
        self.trained, self.average = chosen, dict[str, Tensor]()
        self.draw = DISTRIBUTIONS[config.distribution]

    def along(self, step: int, probe: int, name: str) -> Tensor:
        return direction(self.draw, self.making.seed, step, probe, name, self.trained[name])

    @torch.no_grad()
    def fill(self, window: Window) -> Tensor:
        config, device = self.config, next(iter(self.trained.values())).device
        one = steps_of(self.making.model)
        scales = {name: config.eps * one.get(name, 1.0) for name in self.trained}
        slopes, told = [], zeros(window)
        again = same_draws(device)
        with moved(self.trained) as move:
            for probe in range(config.probes):
                sides = []
                for sign in (1.0, -1.0):
                    again()
                    for name in self.trained:
                        move(name, self.along(window.step, probe, name) * (sign * scales[name]))
                    sides.append(summed(window))
                up, down = (window.objective(side) for side in sides)
                slopes.append((up - down) / (2 * config.probes))
                told += (sides[0] + sides[1]) / (2 * config.probes)
        for name, parameter in self.trained.items():
            found = torch.zeros_like(parameter)
            for probe, slope in enumerate(slopes):
                found += self.along(window.step, probe, name) * (slope.float() / scales[name])
            if name in self.average:
                found.mul_(1 - config.momentum).add_(self.average[name], alpha=config.momentum)
            parameter.grad = found
        return told

    def after_step(self, window: Window, rates: dict[str, float]) -> None:
        """The average goes on with steps that were taken only. It begins with the first estimate."""
        if self.config.momentum:
            self.average = {n: p.grad.detach() for n, p in self.trained.items() if p.grad is not None}

    def carry(self, carried: Iterable[Carried]) -> None:
        names = {id(parameter): name for name, parameter in self.trained.items()}
        for one in carried:
            name = names.get(id(one.parameter))
            if name in self.average:
                self.average[name] = followed(self.average[name], one.source)

    def state(self) -> dict[str, Tensor]:
        return self.average

    def load(self, state: dict[str, Tensor]) -> None:
        self.average = dict(state)


def summed(window: Window) -> Tensor:
    """The sums of the parts of the loss over the micro-batches [parts] fp64, without gradients."""
    sums = zeros(window)
    for i in range(window.size):
        parts = window.loss(i)
        assert not parts.requires_grad, "nothing may be saved for a backward"
        sums += parts
    return sums


@torch.no_grad()
def steps_of(model: nn.Module) -> dict[str, Tensor | float]:
    """What one grid step is for the trained tensors of all adapters, by their names in the model."""
    found: dict[str, Tensor | float] = {}
    for name, layer in adapted_layers(model):
        if isinstance(layer.adapter, Adapter):
            found |= {f"{name}.adapter.{k}": v for k, v in layer.adapter.one_step(layer.base).items()}
    return found
