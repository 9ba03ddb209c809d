"""Random directions for estimates: drawn from a seed per tensor, moved along, and put back bit for bit.

A direction is made anew wherever it is needed and never kept: its generator is seeded with a hash of the
run's seed, the step, the probe and the name of the tensor, so that neither the order of the tensors nor how
processes share the work matters. Numbers are independent, of mean 0 and variance 1, by one of

    uniform      (-sqrt 3, sqrt 3)       smooths round into its straight-through backward, the identity, at a
                                         standard deviation of 1 / (2 sqrt 3) steps; and sign into hardtanh's
    triangular   (-sqrt 6, sqrt 6)       smooths sign into ApproxSign's backward, 2 - 2|x|, at 1 / sqrt 6
    logistic     atanh                   smooths sign into tanh's backward at pi / sqrt 12
    normal       N(0, 1)
    rademacher   -1 or 1

(FOGZO, arXiv 2510.23926; WIDTHS has the standard deviations.)

While tensors are moved, what they were lies in a copy: adding and subtracting again would leave roundings
behind in every step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Draw = Callable[[torch.Size, torch.Generator], Tensor]
# Of the smoothed operator whose derivative is the backward of a straight-through estimator: standard
# deviation, in steps of round, or in units of sign's input.
WIDTHS = {
    ("round", "identity"): 1 / math.sqrt(12),
    ("sign", "hardtanh"): 1 / math.sqrt(3),
    ("sign", "approx_sign"): 1 / math.sqrt(6),
    ("sign", "tanh"): math.pi / math.sqrt(12),
}


def _even(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)


def _uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return (2 * _even(shape, generator) - 1).mul_(math.sqrt(3))


def _triangular(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return (_even(shape, generator) - _even(shape, generator)).mul_(math.sqrt(6))


def _logistic(shape: torch.Size, generator: torch.Generator) -> Tensor:
    # The density of tanh's derivative has no end: 1e-7 off the ends, where fp32 would say infinity.
    even = (2 * _even(shape, generator) - 1).clamp_(-1 + 2e-7, 1 - 2e-7)
    return even.atanh_().mul_(math.sqrt(12) / math.pi)


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)


def _rademacher(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return (_even(shape, generator) < 0.5).float().mul_(2).sub_(1)


DISTRIBUTIONS: dict[str, Draw] = {
    "uniform": _uniform,
    "triangular": _triangular,
    "logistic": _logistic,
    "normal": _normal,
    "rademacher": _rademacher,
}


def seeded(seed: int, step: int, probe: int, name: str) -> int:
    """63 bits for the generator of a direction."""
    found = hashlib.sha256(f"{seed}/{step}/{probe}/{name}".encode()).digest()
    return int.from_bytes(found[:8], "big") >> 1


def direction(draw: Draw, seed: int, step: int, probe: int, name: str, like: Tensor) -> Tensor:
    """fp32, of the shape and on the device of `like`; the same for the same arguments on one kind of
    device."""
    return draw(like.shape, torch.Generator(like.device).manual_seed(seeded(seed, step, probe, name)))


@contextmanager
def moved(tensors: Mapping[str, nn.Parameter]) -> Iterator[Callable[[str, Tensor], None]]:
    """Inside, move(name, by) puts a tensor at what it was plus `by`; behind it all are what they were."""
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def move(name: str, by: Tensor) -> None:
        tensors[name].copy_(kept[name] + by)

    with torch.no_grad():
        try:
            yield move
        finally:
            for name, tensor in tensors.items():
                tensor.copy_(kept[name])


def same_draws(device: torch.device) -> Callable[[], None]:
    """What puts PyTorch's generators (dropout's) back to where they are now."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def again() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return again
