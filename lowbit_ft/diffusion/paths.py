"""Paths from a picture to noise, what a model says on the way, and the way back.

    velocity   x_t = (1 - t) x + t e            v* = e - x       t in 0 .. 1, the model is told 1000 t
    noise      x_k = a_k x + b_k e              e* = e           k = 0 .. 999
               a_k^2 = product of 1 - beta up to k, b_k^2 = 1 - a_k^2, beta from 1e-4 to 2e-2 in even steps

velocity is rectified flow (arXiv 2209.03003) as SD3 and Flux are trained, noise is DDPM (2006.11239) as DiT
is; both in diffusers' direction and units (FlowMatchEulerDiscreteScheduler, DDIMScheduler), so its schedulers
sample from what ships. A model that gives twice the channels of its input (a learned variance) is read by the
first half.

    back       velocity: Euler, x <- x - v / n, at t = 1, 1 - 1/n, ...       noise: DDIM (2010.02502), eta 0

With guidance g the answer is f_0 + g (f_1 - f_0), f_0 without a label (2207.12598).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

STEPS_OF_NOISE = 1000
# Where training looks: a chance of 0 .. 1 -> t. middle: a logit-normal time, as SD3 was trained (2403.03206).
TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "even": lambda chance: chance,
    "middle": lambda chance: torch.special.ndtri(chance).sigmoid(),
}
# Of the pictures that are made at a time, height x width of what the model sees: 4 of 1024 x 1024 in latents.
PLACES = 1 << 16
GOLDEN = 0.6180339887498949  # multiples of it fill 0 .. 1 evenly, however many there are


class Path(ABC):
    """x, noise [B, C, H, W]; t [B] in 0 .. 1, 1 is noise."""

    name: str

    @abstractmethod
    def noisy(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t."""

    @abstractmethod
    def wanted(self, x: Tensor, noise: Tensor) -> Tensor:
        """What the model has to say."""

    @abstractmethod
    def told(self, t: Tensor) -> Tensor:
        """The time as the model is told it, fp32 [B]."""

    @abstractmethod
    def back(self, says: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
        """From noise to pictures. says(x_t, what `told` gives [B]) -> the answer of the model."""


class Velocity(Path):
    name = "velocity"

    def noisy(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        at = t[:, None, None, None]
        return (1 - at) * x + at * noise

    def wanted(self, x: Tensor, noise: Tensor) -> Tensor:
        return noise - x

    def told(self, t: Tensor) -> Tensor:
        return 1000 * t

    def back(self, says: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
        x = noise
        for step in range(steps):
            t = torch.full((len(x),), 1 - step / steps, device=x.device)
            x = x - says(x, self.told(t)) / steps
        return x


class Noise(Path):
    name = "noise"

    def _place(self, t: Tensor) -> Tensor:
        """The number of the step, int64 [B]."""
        return (t * STEPS_OF_NOISE).long().clamp_max(STEPS_OF_NOISE - 1)

    def noisy(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        kept = kept_signal().to(x.device)[self._place(t)][:, None, None, None]
        return (kept.sqrt() * x.double() + (1 - kept).sqrt() * noise.double()).to(x.dtype)

    def wanted(self, x: Tensor, noise: Tensor) -> Tensor:
        return noise

    def told(self, t: Tensor) -> Tensor:
        return self._place(t).float()

    def back(self, says: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
        x, table = noise, kept_signal()
        each = STEPS_OF_NOISE // steps
        for k in reversed(range(0, each * steps, each)):
            found = says(x, torch.full((len(x),), float(k), device=x.device)).double()
            now, then = float(table[k]), float(table[k - each]) if k else 1.0
            clean = (x.double() - (1 - now) ** 0.5 * found) / now**0.5
            x = (then**0.5 * clean + (1 - then) ** 0.5 * found).to(noise.dtype)
        return x


PATHS: dict[str, Path] = {"velocity": Velocity(), "noise": Noise()}


@cache
def kept_signal() -> Tensor:
    """a_k^2, fp64 [1000]."""
    beta = torch.linspace(1e-4, 2e-2, STEPS_OF_NOISE, dtype=torch.float64)
    return (1 - beta).cumprod(0)


def answer(sample: Tensor, channels: int) -> Tensor:
    """What a model says of the picture, without its variances."""
    return sample[:, :channels]


Told = dict[str, Tensor]  # what a model is told of pictures: their labels, or the states of their texts


@torch.no_grad()
def sampled(
    model: Any, path: Path, told: Told, without: Told, noise: Tensor, steps: int, guidance: float = 1.0
) -> Tensor:
    """Pictures [B, C, H, W] of what is told of them from this noise, on the CPU. without: what stands for
    nothing told, of as many. They are made some at a time, so that memory does not grow with B."""
    size = max(1, PLACES // (noise.shape[2] * noise.shape[3]))
    made = []
    for at in range(0, len(noise), size):
        some, none = ({n: v[at : at + size] for n, v in one.items()} for one in (told, without))
        made.append(_sampled(model, path, some, none, noise[at : at + size], steps, guidance))
    return torch.cat(made)


def _sampled(
    model: Any, path: Path, told: Told, without: Told, noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """The same of so many together."""
    device, channels, seen = next(model.parameters()).device, noise.shape[1], model.config.traits
    told, without = ({name: value.to(device) for name, value in one.items()} for one in (told, without))

    def says(x: Tensor, time: Tensor) -> Tensor:
        def one(given: Told) -> Tensor:
            said = model(seen.packed(x), timestep=time / seen.per, **given).sample.float()
            return answer(seen.unpacked(said), channels)

        found = one(told)
        return found if guidance == 1 else (base := one(without)) + guidance * (found - base)

    return path.back(says, noise.to(device), steps).cpu()
