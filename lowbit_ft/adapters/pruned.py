"""Pruned: an adapter whose weights become zeros while it trains (sparsity/gradual.py).

`zeros` holds a bit per weight, as the mask of a base does, and `grid_args` hands it to the op that makes the
codes of forward and merge: so what the last step ran on is what ships. It is a buffer: saved with what
trains, hashed there, and read back. Before a step that the schedule names it is chosen anew, from the weights
as they are before rounding. One that is zero learns nothing, but keeps the value it had, by which it may come
back when a smaller one goes.

A method can be such whose op makes all codes anew (`AdapterConfig.prunes`); one that leaves some to the base
cannot.
"""

from collections.abc import Mapping

import lowbit_kernels as kernels
import torch
from lowbit_kernels.codes import grid_values
from lowbit_kernels.layout import per_group, row_chunks, ungrouped
from torch import Tensor

from ..grid import GridArgs, PackedWeight, Weight
from ..sparsity import PATTERNS, SPARSITY, Asked, Gradual
from .base import Adapter
from .carry import Carried


class Pruned(Adapter):
    """Its buffer: zeros int16 [N, W_1], where it is pruned while it trains, or was."""

    gradual: Gradual | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the layer's weight, (N, K)."""
        raise AssertionError(f"{type(self).__name__} does not say its shape")

    @property
    def mask(self) -> Tensor | None:
        """The zeros, for GridArgs.mask; None: there are none of its own."""
        return self._buffers.get("zeros")

    @property
    def zero_count(self) -> int:
        """How many weights are zero by now because they were chosen."""
        mask = self.mask
        return 0 if mask is None else int(kernels.unpack(mask, 1, self.shape[1]).sum())

    def prune_by(self, gradual: Gradual) -> None:
        """From now on zeros come by this schedule; there are none yet."""
        self.gradual = gradual
        self._make_room()

    @torch.no_grad()
    def begin_step(self, step: int, base: Weight) -> list[Carried]:
        share = None if self.gradual is None else self.gradual.share(step)
        if share is not None:
            assert isinstance(base, PackedWeight)
            self.choose_zeros(base, share)
        return super().begin_step(step, base)

    def choose_zeros(self, base: PackedWeight, share: float) -> None:
        """Choose this share of the weights anew; no fewer than there are (a longer run may ask for fewer)."""
        assert self.gradual is not None and (mask := self.mask) is not None
        share = max(share, self.zero_count / (self.shape[0] * self.shape[1]))
        asked = Asked(share, PATTERNS[self.gradual.pattern])
        zeros = SPARSITY[self.gradual.kind].zeros(unrounded(base, self.grid_args(base)), asked)
        mask.copy_(kernels.pack(zeros.to(torch.uint8), 1))

    def resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if self.mask is None and shapes.get("zeros") == self._zeros_shape:
            self._make_room()
        super().resize(shapes)

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """A bit per weight of the layer, and none behind its rows' ends."""
        zeros = tensors.get("zeros")
        if zeros is not None:
            if zeros.dtype != torch.int16 or tuple(zeros.shape) != self._zeros_shape:
                got = f"{zeros.dtype} {list(zeros.shape)}"
                return f"zeros: got {got}; needs int16 {list(self._zeros_shape)}, a bit per weight"
            if not torch.equal(kernels.pack(kernels.unpack(zeros, 1, self.shape[1]), 1), zeros):
                return f"zeros: has bits behind the {self.shape[1]} weights of a row"
        return super().misfit(tensors)

    def _make_room(self) -> None:
        device = next(self.parameters()).device
        self.register_buffer("zeros", torch.zeros(self._zeros_shape, dtype=torch.int16, device=device))

    @property
    def _zeros_shape(self) -> tuple[int, int]:
        return self.shape[0], kernels.packed_width(self.shape[1], 1)


def unrounded(base: PackedWeight, args: GridArgs) -> Tensor:
    """What args make of the base before it is rounded, fp32 [N, K], in units of the weight."""
    (n, k), size, grid = base.shape, base.grid.group_size, base.on_grid(args)
    out = torch.empty(n, k, dtype=torch.float32, device=base.codes.device)
    for rows in row_chunks(n, k):
        zero = float(base.grid.levels // 2) if args.zero is None else per_group(args.zero, rows)
        value = (grid_values(rows, grid, k, size) - zero) * per_group(args.scale, rows)
        out[rows] = ungrouped(value, k)
    return out
