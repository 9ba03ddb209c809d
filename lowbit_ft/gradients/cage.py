"""cage: beside any kind, a pull of every trained weight to the code it rounds to (CAGE, arXiv 2510.18784).

    e = v - code        in grid steps, 0 where v lies beyond the last code (skip_clipped)
    lambda_t = 0 while (t + 1) / T <= silence, then up to lambda in a straight line (linear_ramp) or at once

    decoupled    behind the optimizer's step, with the learning rate lr of that step:  v <- v - lr lambda_t e
    coupled      in the gradient, before it is clipped:  G <- G + lambda_t e dv        the optimizer shapes it

A dense weight can do that as it stands: between two codes its distance shrinks by (1 - lr lambda) per step. A
low-rank one cannot: decoupled, B goes where the rows of A let v follow most, which is mostly back to 0, since
v - code of a weight that has not crossed a boundary holds its whole update (measured, LOG.md: a pull of 1 in
all costs a quarter of what training won, one of 0.1 nearly nothing; so small is the default). Coupled is the
chain rule of lambda / 2 |v - code|^2 through A and B (adapters/latent.py). Distances count grid steps: of a
coupled pull, lambda here is the paper's times the square of a step.

`unit: raw` takes lambda as it is written: the paper's 10 is for the learning rates of pre-training. `unit:
pull` takes it as what is pulled in all, sum over the run of lr lambda_t: exp(-lambda) of a distance is left
where nothing else moves. lr lambda must stay below 1. Nothing is kept: a resumed run pulls alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..adapters.attach import adapted_layers
from ..adapters.base import Adapter
from ..adapters.carry import Carried
from ..grid import PackedWeight
from .base import Gradient, Making, Window
from .refusals import Problem, fp32_masters, no_warmup, something_rounded

CLOSED = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True)


class CageConfig(BaseModel):
    """train.gradient.cage: the pull to the codes."""

    model_config = CLOSED

    strength: Annotated[float, Field(gt=0)] = Field(
        default=0.1, alias="lambda", description="how strong the pull is, in what `unit` says"
    )
    unit: Literal["pull", "raw"] = Field(
        default="pull",
        description="of lambda. pull: the sum over the run of learning rate x lambda; raw: lambda itself "
        "(the paper: 10)",
    )
    silence: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.8, description="share of the run before the pull begins: codes that are held too early stay"
    )
    schedule: Literal["linear_ramp", "constant"] = Field(
        default="linear_ramp", description="lambda behind the silence: from 0 up to it, or the whole of it"
    )
    form: Literal["decoupled", "coupled"] = Field(
        default="decoupled", description="behind the optimizer's step, or in the gradient"
    )
    skip_clipped: bool = Field(
        default=True, description="leave weights beyond the last code alone: nothing rounds them"
    )

    @model_validator(mode="after")
    def _unit(self) -> CageConfig:
        if self.form == "coupled" and self.unit == "pull":
            raise ValueError(
                "form coupled with unit pull, which counts what the learning rate pulls by itself; a coupled "
                "pull goes through the optimizer: set unit: raw"
            )
        return self

    def problems(self, recipe: Any, kind: str) -> Iterator[Problem]:
        here = ("train", "gradient", "cage")
        yield from something_rounded(recipe, here, "gradient.cage")
        yield from no_warmup(recipe, "gradient.cage")
        yield from fp32_masters(recipe, "gradient.cage")
        if self.form == "coupled" and kind != "backprop":
            yield (
                (*here, "form"),
                f"got 'coupled' with kind: {kind}, whose estimate is scaled otherwise than a pull; set "
                "decoupled",
            )
        if self.form == "coupled" and recipe.train.mixed_precision == "fp16":
            yield (
                (*here, "form"),
                "got 'coupled' with mixed_precision fp16, whose scaler scales the gradient that the pull is "
                "added to; set decoupled, or mixed_precision: bf16",
            )

    def share(self, step: int, total: int) -> float:
        """lambda_t over lambda, in 0-based step of total."""
        done = (step + 1) / total
        if done <= self.silence:
            return 0.0
        return 1.0 if self.schedule == "constant" else (done - self.silence) / (1 - self.silence)

    def raw(self, rates: Sequence[float]) -> float:
        """lambda in raw units. rates: the learning rates of all steps. ValueError for a step that would throw
        weights past their codes."""
        if self.form == "coupled":
            return self.strength
        pulls = [rate * self.share(step, len(rates)) for step, rate in enumerate(rates)]
        scale = self.strength
        if self.unit == "pull":
            scale = self.strength / sum(pulls) if any(pulls) else 0.0
        if (most := max(pulls, default=0.0) * scale) >= 1:
            raise ValueError(
                f"a step pulls by learning rate x lambda = {most:.3g}, which must stay below 1: it would "
                "throw weights past their codes; lower lambda or silence, or train for more steps"
            )
        return scale


class Cage(Gradient):
    """The pull around the gradient of a kind. `scale`: lambda in raw units."""

    def __init__(self, config: CageConfig, made: Gradient, making: Making):
        self.config, self.made, self.making = config, made, making
        self.layers: list[tuple[str, Adapter, Any]] = [
            (name, layer.adapter, layer)
            for name, layer in adapted_layers(making.model)
            if isinstance(layer.adapter, Adapter) and layer.adapter.config.code_parameters
        ]
        if not self.layers:
            raise ValueError(
                "train.gradient.cage: nothing that trains is rounded to codes; remove it, or attach lr_qat"
            )
        try:
            self.scale = config.raw([making.rate(t) for t in range(making.total)])
        except ValueError as error:
            raise ValueError(f"train.gradient.cage: {error}") from None

    def fill(self, window: Window) -> Tensor:
        sums = self.made.fill(window)
        strength = self.scale * self.config.share(window.step, self.making.total)
        if self.config.form == "coupled" and strength:
            for name, adapter, base in self.packed():
                for key, pull in adapter.pull(base, self.config.skip_clipped).items():
                    parameter = self.making.trained.get(f"{name}.adapter.{key}")
                    if parameter is not None and parameter.grad is not None:
                        parameter.grad.add_(pull, alpha=strength)
        return sums

    def after_step(self, window: Window, rates: dict[str, float]) -> None:
        self.made.after_step(window, rates)
        strength = self.scale * self.config.share(window.step, self.making.total)
        if self.config.form == "coupled" or not strength:
            return
        with torch.no_grad():
            for name, adapter, base in self.packed():
                drawn = adapter.drawn(base, rates["lr"] * strength, self.config.skip_clipped)
                for key, by in drawn.items():
                    self.making.trained[f"{name}.adapter.{key}"].add_(by)

    def packed(self) -> Iterator[tuple[str, Adapter, PackedWeight]]:
        """The layers whose weights are pulled, with their bases."""
        for name, adapter, layer in self.layers:
            assert isinstance(layer.base, PackedWeight)
            yield name, adapter, layer.base

    def carry(self, carried: Iterable[Carried]) -> None:
        self.made.carry(carried)

    def state(self) -> dict[str, Tensor]:
        return self.made.state()

    def load(self, state: dict[str, Tensor]) -> None:
        self.made.load(state)
