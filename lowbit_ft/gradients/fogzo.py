"""kind: fogzo. Backprop's direction, weighed by the loss (first-order-guided zeroth order, arXiv 2510.23926).

    g       backprop's gradient of what moves codes; all else keeps its own
    g^      = D g / |D g|                            one norm over all of them
    v       = sqrt(beta) s g^ + sqrt(1 - beta) u     s = -1 or 1, u independent, of variance 1
    d       = (L(theta + D v) - L(theta - D v)) / 2  two forwards, on the same micro-batches and draws
    G       = 1/n sum d v / D                        E[G] = (1 - beta) L' + beta g (g^T D^2 L') / |D g|^2

with L' the gradient of the smoothed loss. Where the straight-through direction is wrong, its term shrinks by
itself. D is diagonal, a number per tensor: the width of the smoothing, 1 / sqrt 12 of a grid step (round is
then smoothed into the straight-through backward, directions.py), over what one step is for the tensor.

|g^| = 1 and |u| = sqrt(n) for n numbers, so beta has to stay within O(1 / n) of 1. What is asked for is
kappa = (1 - beta) n, the squared noise over the squared guided part; 1 - beta = kappa / n is kept and beta
never is. kappa is 0 at `start` of the run, where this begins, and rises to kappa_end in a straight line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..adapters.attach import adapted_layers
from ..adapters.base import Adapter
from .backprop import Backprop
from .base import Gradient, Making, Window, zeros
from .config import GradientConfig
from .directions import DISTRIBUTIONS, WIDTHS, direction, moved, same_draws, seeded
from .refusals import Problem, fp32_masters, no_warmup, something_rounded
from .zeroth_order import steps_of


class FogzoConfig(GradientConfig):
    whole: ClassVar[bool] = True
    estimates: ClassVar[bool] = True

    kind: Literal["fogzo"] = "fogzo"
    probes: Annotated[int, Field(ge=1)] = Field(
        default=1, description="directions per step, of two more forwards each"
    )
    kappa_end: Annotated[float, Field(ge=0)] = Field(
        default=0.1, description="squared noise over the squared guided part at the end of the run"
    )
    start: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.7, description="share of the run by backprop alone, before this begins"
    )
    smoothing: Literal["auto", "uniform", "normal", "triangular", "logistic"] = Field(
        default="auto", description="of the random part. auto: what round's backward is the smoothing of"
    )

    def build(self, making: Making) -> Gradient:
        return Fogzo(self, making)

    def problems(self, recipe: Any) -> Iterator[Problem]:
        yield from super().problems(recipe)
        # Where nothing is rounded, backprop is exact.
        yield from something_rounded(recipe, ("train", "gradient", "kind"), "gradient.kind: fogzo")
        yield from no_warmup(recipe, "gradient.kind: fogzo")
        yield from fp32_masters(recipe, "gradient.kind: fogzo")
        if recipe.train.mixed_precision == "fp16":
            yield (
                ("train", "mixed_precision"),
                "got 'fp16', whose scaler scales the gradient that gradient.kind: fogzo measures; set bf16 "
                "or no",
            )

    @property
    def masters(self) -> int:
        return 4

    def told(self, checkpointing: bool) -> str | None:
        more = 100 * 2 * self.probes / (4 if checkpointing else 3)
        return f"gradient fogzo: from {self.start:.0%} of the run on, about {more:.0f} % more time per step"


class Fogzo(Backprop):
    def __init__(self, config: FogzoConfig, making: Making):
        self.config, self.making = config, making
        self.latent = {
            name: making.trained[name]
            for layer_name, layer in adapted_layers(making.model)
            if isinstance(layer.adapter, Adapter)
            for key in sorted(layer.adapter.config.code_parameters)
            if (name := f"{layer_name}.adapter.{key}") in making.trained
        }
        if not self.latent:
            raise ValueError("train.gradient: got fogzo, but nothing that trains is rounded to codes")
        if config.kappa_end >= (count := sum(p.numel() for p in self.latent.values())):
            raise ValueError(
                f"train.gradient.kappa_end: got {config.kappa_end:g}; allowed: below the {count} numbers "
                "that move codes (at that, all is noise)"
            )
        self.draw = DISTRIBUTIONS["uniform" if config.smoothing == "auto" else config.smoothing]

    def kappa(self, step: int) -> float | None:
        """(1 - beta) n of a 0-based step; None while backprop alone is asked for."""
        total, start = self.making.total, self.config.start
        done = step / total
        if done < start:
            return None
        return self.config.kappa_end * (done - start) / (1 - start)

    def fill(self, window: Window) -> Tensor:
        kappa = self.kappa(window.step)
        if kappa is None:
            return super().fill(window)
        device, draws = next(iter(self.latent.values())).device, []

        def loss(i: int) -> Tensor:
            """Of micro-batch i; what its dropout draws is drawn again in the forwards behind it."""
            draws.append(same_draws(device))
            return window.loss(i)

        sums = super().fill(replace(window, loss=loss))
        behind = same_draws(device)
        try:
            self.weigh(window, kappa, draws)
        finally:
            behind()
        return sums

    @torch.no_grad()
    def weigh(self, window: Window, kappa: float, draws: list[Any]) -> None:
        """Put G in the place of backprop's gradient."""
        given = {n: p.grad for n, p in self.latent.items() if p.grad is not None}
        one = steps_of(self.making.model)
        width = WIDTHS["round", "identity"]
        scales = {name: width * one[name] for name in given}
        squares = [(grad.double() * scales[name]).square().sum() for name, grad in given.items()]
        norm = torch.stack(squares).sum().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        noise = kappa / sum(grad.numel() for grad in given.values())  # 1 - beta
        guided, seed, probes = math.sqrt(1 - noise), self.making.seed, range(self.config.probes)

        def along(probe: int, name: str) -> Tensor:
            """v of a tensor."""
            sign = 1.0 if seeded(seed, window.step, probe, "") & 1 else -1.0
            v = given[name] * (scales[name] / norm * (sign * guided)).float()
            if not noise:
                return v
            u = direction(self.draw, seed, window.step, probe, name, v)
            return v.add_(u, alpha=math.sqrt(noise))

        slopes = []
        with moved({name: self.latent[name] for name in given}) as move:
            for probe in probes:
                sides = []
                for sign in (1.0, -1.0):
                    for name in given:
                        move(name, along(probe, name) * (sign * scales[name]))
                    sums = zeros(window)
                    for i in range(window.size):
                        draws[i]()
                        sums += window.loss(i)
                    sides.append(window.objective(sums))
                slopes.append((sides[0] - sides[1]) / (2 * self.config.probes))
        for name in given:
            parts = [along(probe, name) * (slopes[probe].float() / scales[name]) for probe in probes]
            given[name].copy_(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])
