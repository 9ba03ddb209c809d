"""EfQAT: full QAT of the rows that matter most, so that the backward costs little more than frozen weights do
(arXiv 2411.11038).

    W^[n] = S * clip(round(Phi0[n] + D[n]))    of the R chosen rows;   of all others the base's codes
    importance of a row = mean |W^[n]|         or mean |W^[n]| rms(x), by what step 0 saw of the layer's input

D [R, K] counts grid steps and starts at 0 (full_qat.py). The backward makes dX and, instead of dW, R / N of
it; the scales of all rows train (row-wise identity, or a share of the tokens:
lowbit_kernels/grid_linear.py).

`scope` is the paper's: the share of every layer's rows (CWPL), of all rows of the network (CWPN; each layer
keeps min_rows, so that none starves), or of the weights in whole layers (LWPN). How many rows a layer has is
settled at the start, in 16s, which tensor cores want. `refresh_steps` chooses them anew: a row that leaves
keeps the codes that it has then, one that comes back starts at its codes, and the optimizer's averages follow
their rows (carry.py).
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from lowbit_kernels import packed_width
from lowbit_kernels.pack import decode_residual
from pydantic import Field, PrivateAttr
from torch import Tensor

from ..grid import GridArgs, IntGrid, PackedWeight, Weight
from .carry import Carried
from .dense import DenseAdapter, DenseOptions
from .rows import TILE, allotted, highest, in_tiles, row_importance


class EfQATConfig(DenseOptions):
    method: Literal["ef_qat"] = "ef_qat"
    train_scale: Literal[True] = True
    share: float = Field(0.1, gt=0, le=1, description="of the rows (or weights) that train beside the scales")
    scope: Literal["per_layer", "network", "whole_layers"] = Field(
        "per_layer",
        description="where the share is taken. per_layer: of every layer's rows; network: of all rows, by "
        "one threshold; whole_layers: all rows of the layers that matter most, none of the others",
    )
    importance: Literal["weight", "weight_input"] = Field(
        "weight",
        description="of a row. weight: mean |w|; weight_input: mean |w| rms(x), chosen after step 0, which "
        "sees the inputs",
    )
    refresh_steps: int | None = Field(
        None, ge=1, description="choose the rows anew after so many optimizer steps; null: never"
    )
    min_rows: int = Field(TILE, ge=TILE, multiple_of=TILE, description="of every layer that has so many")
    scale_grad_tokens: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of the tokens, drawn anew in every backward, that the scales of the other rows "
        "learn from where a row has several; with one scale per row their gradient costs no product",
    )
    # How many rows this layer was allotted by `over`, where the scope is wider than a layer.
    _rows: int | None = PrivateAttr(None)

    @property
    def changes_rows(self) -> bool:
        return self.refresh_steps is not None or self.importance == "weight_input"

    def over(self, bases: Iterable[tuple[str, Weight]]) -> Mapping[str, "EfQATConfig"]:
        if self.scope == "per_layer":
            return super().over(bases)  # pyright: ignore[reportReturnType]  each is self
        found = {name: (row_importance(base), base.shape) for name, base in bases}
        out = {}
        for name, count in allotted(found, self.share, self.scope, self.min_rows).items():
            out[name] = self.model_copy()
            out[name]._rows = count
        return out

    def rows_of(self, n: int) -> int:
        """How many of a layer's n rows train. Before `over` was asked, what an even spread gives."""
        return in_tiles(self.share * n, n, self.min_rows) if self._rows is None else self._rows

    def gradient_cost(self, grid: IntGrid) -> float:
        """Products of the layer's size that the gradients of D and the scales cost, on an average layer."""
        return self.share + (0.0 if grid.group_size == -1 else self.scale_grad_tokens)

    def build(self, base: Weight, weight: Tensor | None = None) -> "EfQAT":
        assert isinstance(base, PackedWeight)
        return EfQAT(self, base)


class EfQAT(DenseAdapter):
    """delta [R, K] of rows int64 [R], rising (neither where R = 0). Where rows change: left int64 [L], the
    rows that trained and do no more, and their codes left_codes [L, W]; input_size [K], of what step 0 saw.
    """

    config: EfQATConfig
    rows: Tensor
    left: Tensor
    left_codes: Tensor
    input_size: Tensor

    def __init__(self, config: EfQATConfig, base: PackedWeight):
        super().__init__(config, base)
        (n, k), device = base.shape, base.codes.device
        count = config.rows_of(n)
        # Until somebody counts the steps nothing is looked at and nothing changes, which is said once.
        self.watching, self.counted = False, not config.changes_rows
        self.alone = False  # input_size holds what this process has seen, and not yet the others
        self.delta = config.fresh((count, k), device) if count else None
        if not count:
            return
        self.register_buffer("rows", highest(row_importance(base), count))
        if config.changes_rows:
            self.register_buffer("left", torch.empty(0, dtype=torch.int64, device=device))
            width = packed_width(k, base.grid.bits)
            self.register_buffer("left_codes", torch.empty(0, width, dtype=torch.int16, device=device))
        if config.importance == "weight_input":
            self.register_buffer("input_size", torch.zeros(k, device=device))

    def grid_args(self, base: PackedWeight) -> GridArgs:
        args = GridArgs(scale=self.scale(base), zero=base.zero, **self.config.gradient_options())
        if self.delta is None:
            return args
        codes = None
        if "left" in self._buffers and len(self.left):
            codes = base.codes.index_copy(0, self.left, self.left_codes)
        return args.with_rows(self.delta, self.rows, codes)

    def forward(self, x: Tensor, base: Weight) -> Tensor:
        if self.training:
            if not self.counted and torch.is_grad_enabled():
                self.say_uncounted("refresh_steps and importance: weight_input do nothing")
            if self.watching:  # also in forwards without a backward, which are all that zeroth order has
                self.input_size += x.detach().float().square().flatten(0, -2).sum(0)
                self.alone = True
        return super().forward(x, base)

    @torch.no_grad()
    def begin_step(self, step: int, base: Weight) -> list[Carried]:
        config, self.counted = self.config, True
        if self.delta is None or not config.changes_rows:
            return []
        by_input = config.importance == "weight_input"
        self.settle()
        self.watching = by_input and step == 0
        every = config.refresh_steps
        if (by_input and step == 1) or (every is not None and step > 0 and step % every == 0):
            assert isinstance(base, PackedWeight)
            return self.choose(base)
        return []

    @torch.no_grad()
    def settle(self) -> None:
        """input_size becomes that of all processes, once: before a checkpoint or before the choice."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.alone and distributed:
            torch.distributed.all_reduce(self.input_size)
        self.alone = False

    def choose(self, base: PackedWeight) -> list[Carried]:
        """The rows that matter most now; what their averages in an optimizer have to follow."""
        assert self.delta is not None
        now, size = base.merged(self.grid_args(base)), self._buffers.get("input_size")
        old = self.rows
        new = highest(row_importance(now, None if size is None else size.sqrt()), len(old))
        place = torch.full((base.shape[0],), -1, device=old.device)
        place[old] = torch.arange(len(old), device=old.device)
        source = place[new]
        stays = source >= 0
        if stays.all():
            return []
        delta = torch.zeros_like(self.delta)
        delta[stays] = self.delta[source[stays]]
        back = torch.isin(new, self.left) & ~stays
        if back.any():
            delta[back] = self.unmoved(base, now, new[back]).to(delta.dtype)
        gone = torch.cat([self.left, old])
        self.left = gone[~torch.isin(gone, new)].sort().values
        self.left_codes = now.codes[self.left]
        self.delta.copy_(delta)
        self.rows.copy_(new)
        return [Carried(self.delta, source)]

    def unmoved(self, base: PackedWeight, now: PackedWeight, rows: Tensor) -> Tensor:
        """The delta that leaves these rows of `now` at their codes: fp32 [n, K], exact in what D is held in.
        In fp32 the values are those codes; in less, whole steps from the base's, with its fractions."""
        start = base.chosen(rows)
        value = start.unpack_codes().float()
        if start.residual is not None and self.config.master == "fp32":
            value += decode_residual(start.residual, base.grid.residual_bits, base.shape[1])
        return now.chosen(rows).unpack_codes().float() - value

    def resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name in ("left", "left_codes"):
            mine = self._buffers.get(name)
            if mine is not None and name in shapes and shapes[name][1:] == mine.shape[1:]:
                self._buffers[name] = mine.new_empty(shapes[name])

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Numbers of rows are rows of this layer, rising, none of them in both; codes are one of each row."""
        n = self.log_scale.shape[1]
        numbers = {key: tensors[key] for key in ("rows", "left") if key in tensors and key in self._buffers}
        for key, value in numbers.items():
            if value.dtype != torch.int64 or value.dim() != 1:
                return f"{key}: got {value.dtype} {list(value.shape)}; needs int64 numbers of rows"
            if len(value) and (value[0] < 0 or value[-1] >= n or not (value.diff() > 0).all()):
                return f"{key}: needs numbers of the layer's {n} rows, rising and each once"
        if len(numbers) == 2 and torch.isin(*numbers.values()).any():
            return "left: has rows that train"
        if said := super().misfit(tensors):
            return said
        codes = tensors.get("left_codes")
        if codes is not None and "left" in numbers:
            if codes.dtype != torch.int16 or len(codes) != len(numbers["left"]):
                return f"left_codes: got {len(codes)} rows of {codes.dtype}; needs int16, one of each of left"
        return None
