"""quant.smooth: the factors of one site, by what its readers are given and what they make of it.

    s = max|x|^alpha / max|W|^(1 - alpha)    per channel (SmoothQuant, arXiv 2211.10438)

`auto` compares the readers' outputs, rounded with x / s and W s, over a sample of rows, and takes the alpha
with the least squared error, or no factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..activations import Activation
from ..rotations import Scaled

ALPHAS = (0.25, 0.5, 0.75, 0.0)  # of smooth: auto, and none at all
LEAST = 2.0**-12  # of capped factors: what is divided by one stays far from the ends of fp16
SAMPLE = 256  # rows of x per site on which smooth: auto compares outputs


@dataclass(frozen=True)
class Reader:
    """A linear: its weight [N, K], what it is given [S, K], the first of its inputs that belong to the site,
    and the packed linear that it is, or is a part of; None: it stays dense, and no rounding counts."""

    weight: Tensor
    x: Tensor
    linear: str | None
    first: int = 0


@dataclass(frozen=True)
class Smoother:
    """choice: quant.smooth. activation: linear -> what its input is put on. rounded: its weight on its grid.
    capped: the largest factor is 1, where 1 is added to what takes them in: 1 + scale' would else be a small
    difference of large numbers in 16 bits."""

    choice: float | Literal["auto"]
    activation: Callable[[str], Activation | None]
    rounded: Callable[[str, Tensor], Tensor]
    capped: bool = False

    def chosen(self, largest: Tensor, readers: list[Reader]) -> tuple[Tensor, float] | None:
        """(factors [H] in float64 on the CPU, alpha) of a site with max|x| `largest` [H]; None: none is best,
        or nothing that is packed reads it."""
        if not any(reader.linear for reader in readers):
            return None
        width = len(largest)
        stretches = [reader.weight[:, reader.first : reader.first + width] for reader in readers]
        across = torch.stack([weight.abs().amax(0) for weight in stretches]).amax(0)
        choice: float | str | None = self.choice
        if choice == "auto":
            losses: dict[float | None, float] = {None: self._loss(readers, None)}
            for alpha in ALPHAS:
                losses[alpha] = self._loss(readers, self._factors(largest, across, alpha))
            choice = min(losses, key=lambda alpha: losses[alpha])
        if choice is None:
            return None
        assert isinstance(choice, float)
        return self._factors(largest, across, choice).cpu(), choice

    def _factors(self, largest: Tensor, across: Tensor, alpha: float) -> Tensor:
        found = smoothing(largest, across, alpha)
        return digits((found / found.max()).clamp(min=LEAST)) if self.capped else found

    def _loss(self, readers: list[Reader], factors: Tensor | None) -> float:
        """Squared error of what the packed readers make of x, relative to it."""
        error = power = 0.0
        for reader in readers:
            if reader.linear is None:
                continue
            x, weight = reader.x, reader.weight
            s = torch.ones_like(x[0])
            if factors is not None:
                s[reader.first : reader.first + len(factors)] = factors.to(x)
            quantizer, seen, want = self.activation(reader.linear), x / s, x @ weight.t()
            seen = seen if quantizer is None else quantizer(seen)
            made = seen @ self.rounded(reader.linear, weight * s).t()
            error += float((made - want).square().sum(dtype=torch.float64))
            power += float(want.square().sum(dtype=torch.float64))
        return error / max(power, 1e-30)


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """max|x|^alpha / max|W|^(1 - alpha) per channel, float64 [H], three digits of it; 1 where either is 0."""
    factors = inputs.double().pow(alpha) / weights.double().pow(1 - alpha)
    return digits(torch.where((inputs > 0) & (weights > 0), factors, 1.0))


def digits(factors: Tensor) -> Tensor:
    """Three of each, float64 [H], on the CPU."""
    return torch.tensor([float(f"{value:.3g}") for value in factors.tolist()], dtype=torch.float64)


class Seen:
    """max|x| of every channel [K], and SAMPLE rows of x."""

    def __init__(self) -> None:
        self.kept = 0
        self.rows: list[Tensor] = []
        self.largest: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """x fp32 [T, K]."""
        top = x.abs().amax(0)
        self.largest = top if self.largest is None else torch.maximum(self.largest, top)
        if self.kept < SAMPLE:
            step = max(1, len(x) * 4 // SAMPLE)  # spread over a batch, over several batches
            self.rows.append(x[::step][: SAMPLE - self.kept])
            self.kept += len(self.rows[-1])


@torch.no_grad()
def look(
    model: nn.Module, sites: tuple[Scaled, ...], batches: Sequence[Mapping[str, Any]], device: torch.device
) -> dict[str, Seen]:
    """Linear -> what it is given, of the readers of these sites, by the whole dense model; where all readers
    of a site are given the same (behind a norm), of the first."""
    found: dict[str, Seen] = {}
    handles = []
    for site in sites:
        for linear, _ in site.readers[: 1 if site.scale else None]:
            seen = found[linear] = Seen()

            def hook(module: nn.Module, args: tuple[Tensor, ...], seen: Seen = seen) -> None:
                seen.add(args[0].reshape(-1, args[0].shape[-1]).float())

            handles.append(model.get_submodule(linear).register_forward_pre_hook(hook))
    try:
        for batch in batches:
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            model(**moved)
    finally:
        for handle in handles:
            handle.remove()
    return found
