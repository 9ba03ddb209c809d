"""signround: rounding offsets and clipping, trained block by block by the signs of gradients (Cheng et al.,
arXiv 2309.05516).

    W^ = s (clip(round(W / s + V + z), 0, 2^b - 1) - z)         V in [-1/2, 1/2], one for every weight
    symmetric    s = +-alpha max|w| / ((2^b - 1) / 2)            alpha, beta in [1/4, 1], one for every group
    asymmetric   s = (alpha max w - beta min w) / (2^b - 1),  z = round(-beta min w / s)

A step is p <- clip(p - rate sign(dL/dp)), rate = (1 - t / steps) / steps, for all three: no number moves by
more than about 1/2. L is the squared error of the whole block's output, on text that comes out of the packed
blocks before it, to the dense block's on the dense model's (Block). Rounding and clipping pass gradients
straight through; s is rounded to the dtype it ships in.

Differences from the paper: alpha and beta start where the clipping search (mse, p = 2) has its best range,
not at 1, from where a 2-bit range cannot be reached in the way a step allows; and the best state is chosen by
the loss over several batches, not over one. The base's codes are those of W + s V, and so is its residual:
training goes on from there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from lowbit_kernels.layout import CHUNK_ELEMENTS, grouped, ungrouped
from torch import Tensor

from ..estimators import cast_scale, round_clip
from ..integer import IntGrid
from ..packed import PackedWeight, Weight
from .descent import checked, descend
from .ranges import Stats, search

NARROWEST = 0.25  # of a group's range; the search's best is hardly ever below 0.3 (ranges.RATIOS)
CACHED = 1 << 16  # weights at a time on a CPU (256 KB of each of a few tensors)
P = 2.0  # norm of the search for the start: what is minimised after it is a squared error


class Block(Protocol):
    """A decoder layer, as a block-wise calibrator sees it. weights: name -> fp32 [N, K] of the linears to be
    packed; batches: of calibration text.
    """

    weights: Mapping[str, Tensor]
    grids: Mapping[str, IntGrid]
    zeros: Mapping[str, Tensor]  # bool [N, K] of the linears that have weights locked at zero
    batches: int

    def loss(self, number: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Error of the block's output on batch `number` when its linears have these weights, a scalar."""
        ...


def _chunks(groups: Tensor) -> list[slice]:
    """Rows at a time: what goes through many small operations stays in the cache of a CPU."""
    most = CACHED if groups.device.type == "cpu" else CHUNK_ELEMENTS
    step = max(1, most // groups[0].numel())
    return [slice(start, start + step) for start in range(0, len(groups), step)]


class _Rounded(torch.autograd.Function):
    """s (clip(round(W / s + V + z), 0, top) - z) of groups [N, G, g] by V [N, G, g], s and z [N, G]; z None
    is `middle`. Straight-through.

    Autograd would keep two tensors of the weight's size and go through memory some thirty times. Here all is
    made again, some rows at a time, by the same operations in the same order: the bits are the same.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, groups: Tensor, offset: Tensor, scale: Tensor, zero: Tensor | None, middle: float, top: int
    ) -> Tensor:
        ctx.save_for_backward(groups, offset, scale, zero)
        ctx.static = (middle, top)
        out = torch.empty_like(groups)
        for rows in _chunks(groups):
            s, z = scale[rows, :, None], middle if zero is None else zero[rows, :, None]
            part = torch.div(groups[rows], s, out=out[rows]).add_(offset[rows]).add_(z)
            part.round_().clamp_(0, top).sub_(z).mul_(s)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        groups, offset, scale, zero = ctx.saved_tensors
        middle, top = ctx.static
        by_offset, by_scale = torch.empty_like(groups), torch.empty_like(scale)
        by_zero = None if zero is None else torch.empty_like(zero)
        chunks = _chunks(groups)
        ratio, code, inside = (torch.empty_like(groups[chunks[0]]) for _ in range(3))
        for rows in chunks:
            n = len(groups[rows])
            s, z = scale[rows, :, None], middle if zero is None else zero[rows, :, None]
            a = torch.div(groups[rows], s, out=ratio[:n])
            v = torch.add(a, offset[rows], out=code[:n]).add_(z)
            free = torch.clamp(v, 0, top, out=inside[:n]).eq_(v)  # 1 where the clip does nothing, else 0
            q = v.round_().clamp_(0, top).sub_(z)
            moved = torch.mul(grad[rows], s, out=by_offset[rows])
            if by_zero is not None:
                by_zero[rows] = -moved.sum(-1)
            moved.mul_(free)
            if by_zero is not None:
                by_zero[rows] += moved.sum(-1)
            by_scale[rows] = q.mul_(grad[rows]).sum(-1) - a.div_(s).mul_(moved).sum(-1)
        return None, by_offset, by_scale, by_zero, None, None


class Rounding:
    """V [N, G, g], alpha and beta [N, G] of one weight [N, K]; beta only on asymmetric grids."""

    def __init__(self, weight: Tensor, grid: IntGrid, zeros: Tensor | None = None):
        self.zeros = None if zeros is None else grouped(zeros, grid.group_size)  # their V stays 0
        self.grid, self.width = grid, weight.shape[1]
        self.groups = grouped(weight.float(), grid.group_size)
        self.top, self.half = grid.levels - 1, float(grid.levels // 2)
        if grid.symmetric:
            self.low, self.high = None, self.groups.abs().amax(-1).clamp_min(1e-30)
        else:
            self.low, self.high = self.groups.amin(-1).clamp_max(0), self.groups.amax(-1).clamp_min(0)
        scale, zero = search(self.groups, grid, P)
        if zero is None:
            self.high.copysign_(scale)  # the search chose the sign, and it stays
            alpha, beta = scale * self.top / 2 / self.high, None
        else:
            assert self.low is not None
            alpha = scale * (self.top - zero) / self.high.clamp_min(1e-30)
            beta = scale * zero / -self.low.clamp_max(-1e-30)
        self.trained = {"offset": torch.zeros_like(self.groups), "alpha": alpha.clamp(NARROWEST, 1)}
        if beta is not None:
            self.trained["beta"] = beta.clamp(NARROWEST, 1)
        for tensor in self.trained.values():
            tensor.requires_grad_()

    def range(self) -> tuple[Tensor, Tensor | float]:
        """Scale and zero point [N, G], as they ship; gradients reach alpha and beta."""
        high = self.high * self.trained["alpha"]
        if self.low is None:
            return cast_scale(high / (self.top / 2), self.grid.scale_dtype), self.half
        low = self.low * self.trained["beta"]
        scale = cast_scale((high - low) / self.top, self.grid.scale_dtype)
        return scale, round_clip(-low / scale, 0, self.top)

    def weight(self) -> Tensor:
        """W^ [N, K]."""
        scale, zero = self.range()
        zero, middle = (zero, 0.0) if isinstance(zero, Tensor) else (None, zero)
        groups = _Rounded.apply(self.groups, self.trained["offset"], scale, zero, middle, self.top)
        return ungrouped(groups, self.width)  # pyright: ignore[reportArgumentType]  autograd.Function is untyped

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for name, tensor in self.trained.items():
            if tensor.grad is not None:  # of an expert that no token of this batch reached there is none
                tensor.sub_(tensor.grad.sign_(), alpha=rate)
                tensor.clamp_(*((-0.5, 0.5) if name == "offset" else (NARROWEST, 1.0)))
                if name == "offset" and self.zeros is not None:
                    tensor.masked_fill_(self.zeros, 0)
                tensor.grad = None

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        scale, zero = self.range()
        moved = ungrouped(self.groups + self.trained["offset"] * scale.unsqueeze(-1), self.width)
        return PackedWeight.quantize(
            moved, scale.t(), zero.t() if isinstance(zero, Tensor) else None, self.grid
        )


@dataclass
class _BlockText:
    """A block with roundings in it, as descend wants it."""

    block: Block
    roundings: dict[str, Rounding]

    @property
    def batches(self) -> int:
        return self.block.batches

    def loss(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        return self.block.loss(number, {name: r.weight() for name, r in self.roundings.items()})

    @torch.no_grad()
    def whole(self) -> float:
        weights = {name: r.weight() for name, r in self.roundings.items()}
        numbers = checked(self.batches)
        return sum(float(self.block.loss(n, weights)) for n in numbers) / len(numbers)


def signround_block(block: Block, stats: Stats) -> tuple[dict[str, Weight], tuple[float, float]]:
    """The packed weights of a block, and its loss before and after. stats: steps and seed."""
    roundings = {
        name: Rounding(weight, block.grids[name], block.zeros.get(name))
        for name, weight in block.weights.items()
    }
    tensors = {f"{name}/{key}": t for name, r in roundings.items() for key, t in r.trained.items()}

    def step(share: float) -> None:
        for rounding in roundings.values():
            rounding.step(share / stats.steps)

    text = _BlockText(block, roundings)
    before, after, _ = descend(tensors, text, stats.steps, stats.seed, step, "signround")
    return {name: rounding.packed() for name, rounding in roundings.items()}, (before, after)


@dataclass
class _Alone:
    """One linear as a block of its own: |X (W^ - W)^T|^2 / tokens, by the Hessian X^T X / tokens [K, K]."""

    weights: Mapping[str, Tensor]
    grids: Mapping[str, IntGrid]
    hessian: Tensor
    zeros: Mapping[str, Tensor] = field(default_factory=dict)
    batches: int = 1

    def loss(self, number: int, weights: Mapping[str, Tensor]) -> Tensor:
        error = weights[""] - self.weights[""]
        return ((error @ self.hessian) * error).sum()


def signround(weight: Tensor, grid: IntGrid, stats: Stats) -> PackedWeight:
    """weight [N, K] by itself, with stats.curvature of its inputs. ValueError without it."""
    if stats.curvature is None:
        raise ValueError("signround needs calibration text: set quant.calibration.path, or calibrate: mse")
    block = _Alone({"": weight.float()}, {"": grid}, stats.curvature.hessian())
    packed = signround_block(block, stats)[0][""]
    assert isinstance(packed, PackedWeight)
    return packed
