"""L4Q: the merged weight is quantized with a live, trained scale and offset, LSQ style (arXiv 2402.04902, Eq.
5-12).

    Wc = s0 Phi0 + alpha/r * B A;    q = round(clip((Wc - T) / S + z)) - z;    W^ = S q + T

S = s0 * exp(log_scale). Because the base is re-gridded with S, the scale's gradient is LSQ's: sum dW (q - (Wc
- T) / S) inside the range, sum dW q outside. The paper keeps W0 in 16 bit; here Wc is the (bits +
residual_bits) proxy, so residual_bits >= 2: with none, (Wc - T) / S is an integer at the start and that
gradient is zero.

`offset` (the paper's beta, trained in grid steps of s0 from 0; on an asymmetric base it is counted from the
base's zero point):
    none      T = 0, z = base's: ships in the base's own format
    integer   z = clip(round(z0 - offset)): beta tied to -S z, ships in integer-zero formats (an asymmetric
              grid)
    float     T = s0 * offset, rounded to the scale's dtype: the paper's; only the native format can hold it
    auto      none on a symmetric grid, integer on an asymmetric one

`warmup_steps` (the paper's T_wp): that many steps of plain LoRA on the unrounded proxy, then S restarts as
max(|min Wc / Qn|, |max Wc / Qp|) per group (L4Qinit, Eq. 15) of the warmed-up weight. Default 0: keep the
calibrated scale. The steps are counted by whoever trains (`begin_step`); a loop that counts none trains
without a warm-up, which is said once.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from lowbit_kernels import packed_matmul
from lowbit_kernels.codes import grid_values
from lowbit_kernels.layout import row_chunks
from pydantic import Field
from torch import Tensor, nn

from ..grid import Grid, GridArgs, IntGrid, PackedWeight, Weight
from ..grid.estimators import cast, round_clip, scale_gradient
from .base import SCALE_PARAMETERS, LowRankOptions, ScaledAdapter
from .carry import Carried
from .low_rank import LowRank


class L4QConfig(LowRankOptions):
    live_grid: ClassVar[bool] = True

    method: Literal["l4q"] = "l4q"
    clip: Literal["round_then_clip", "clip_then_round"] = "clip_then_round"
    offset: Literal["auto", "none", "integer", "float"] = "auto"
    warmup_steps: int = Field(0, ge=0)

    def reject(self, grid: Grid) -> str | None:
        if reason := super().reject(grid):
            return reason
        assert isinstance(grid, IntGrid)
        if grid.residual_bits < 2:
            return (
                f"l4q re-grids the base with a live scale: with quant.residual_bits: {grid.residual_bits} "
                "its scale gradient is "
                "zero at the start; set quant.residual_bits: 4 (2 at least), or use lr_qat"
            )
        return None

    def offset_kind(self, symmetric: bool) -> str:
        if self.offset == "auto":
            return "none" if symmetric else "integer"
        return self.offset

    @property
    def ships_offset(self) -> bool:
        return self.offset == "float"

    def shipped(self, grid: Grid) -> Grid:
        assert isinstance(grid, IntGrid)
        symmetric = grid.symmetric and self.offset_kind(grid.symmetric) != "integer"
        return replace(grid.deployed, symmetric=symmetric)

    def build(self, base: Weight, weight: Tensor | None = None) -> "L4Q":
        assert isinstance(base, PackedWeight)
        return L4Q(self, base, weight)


class L4Q(LowRank, ScaledAdapter):
    config: L4QConfig

    def __init__(self, config: L4QConfig, base: PackedWeight, weight: Tensor | None):
        super().__init__(config, base)
        self.start(base, weight, unit=base.scale)
        self.kind = config.offset_kind(base.grid.symmetric)
        # Off until begin_step says otherwise: an adapter that is loaded to be evaluated or merged is past its
        # warm-up.
        self.warming = False
        self.counted = not config.warmup_steps  # whether anybody counts the steps of the warm-up
        if self.kind != "none":
            self.offset = nn.Parameter(torch.zeros_like(self.log_scale), requires_grad=config.train_scale)

    def grid_args(self, base: PackedWeight) -> GridArgs:
        scale, zero, offset = self.scale(base), base.zero, None
        if self.kind == "float":
            offset = cast(
                base.scale.float() * scale_gradient(self.offset, self.factor), base.grid.scale_dtype
            )
        elif self.kind == "integer":
            start = float(base.grid.levels // 2) if base.zero is None else base.zero.float()
            z = round_clip(start - scale_gradient(self.offset, self.factor), 0, base.grid.levels - 1)
            zero = z.detach()
            offset = -scale.detach() * (z - zero)  # 0 in value; carries dz = -S dT
        a, b = self.factors()
        return GridArgs(
            scale=scale,
            zero=zero,
            offset=offset,
            a=a,
            b=b,
            gain=self.config.gain,
            units="live",
            clip_first=self.config.clip == "clip_then_round",
            ships_offset=self.kind == "float",
            mask=self.mask,
            **self.config.gradient_options(),
        )

    def forward(self, x: Tensor, base: Weight) -> Tensor:
        assert isinstance(base, PackedWeight)
        if not self.counted and self.training and torch.is_grad_enabled():
            self.say_uncounted(f"warmup_steps {self.config.warmup_steps} does nothing")
        return self.warmup_forward(x, base) if self.warming else super().forward(x, base)

    def warmup_forward(self, x: Tensor, base: PackedWeight) -> Tensor:
        """LoRA on the unrounded proxy: x (s0 Phi0)^T from the two packed buffers, plus the side product."""
        g, f = base.grid, base.grid.residual_bits
        assert base.residual is not None
        y = packed_matmul(x, base.codes, base.scale, base.zero, None, g.bits, g.group_size)
        step = base.scale.float() / (1 << f)  # residual decodes to (e + 1/2) / 2^f - 1/2
        shift = step * (0.5 - (1 << (f - 1)))
        none = torch.zeros_like(step)
        y = y + packed_matmul(x, base.residual, step, none, shift, f, g.group_size)
        a, b = self.factors()
        # DDP refuses trained tensors that the loss does not use: there these get a gradient of zeros (train
        # drops it again).
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            b = b + 0.0 * sum(p.sum() for name, p in self.named_parameters() if name in SCALE_PARAMETERS)
        side = (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t()
        return y + self.config.gain * side

    def merge(self, base: Weight) -> Weight:
        if self.warming:
            raise ValueError(
                f"l4q: the adapter is still in its warm-up of {self.config.warmup_steps} steps, where "
                "nothing is rounded, so what "
                "it computes cannot be merged: train on, calling begin_step(step) before every optimizer "
                "step, or set "
                "warmup_steps: 0"
            )
        return super().merge(base)

    @torch.no_grad()
    def begin_step(self, step: int, base: Weight) -> list[Carried]:
        self.warming, self.counted = step < self.config.warmup_steps, True
        # Only the switch itself restarts the scale: a run resumed after it reads the trained scale.
        if self.config.warmup_steps and step == self.config.warmup_steps:
            assert isinstance(base, PackedWeight)
            self.log_scale.copy_(torch.log(self.range_scale(base) / base.scale.float().abs()))
        return super().begin_step(step, base)

    def range_scale(self, base: PackedWeight) -> Tensor:
        """L4Qinit on the warmed-up weight: [G, N], without the sign of the scale."""
        args, g = self.grid_args(base), base.grid
        z = float(g.levels // 2) if args.zero is None else args.zero.float()
        proxy = base.on_grid(args)._replace(units="live")
        out = torch.empty_like(self.log_scale)
        for rows in row_chunks(*base.shape):
            value = grid_values(rows, proxy, base.shape[1], g.group_size)
            zero = z[:, rows].t().unsqueeze(-1) if isinstance(z, Tensor) else z
            weight = (value - zero) * args.scale[:, rows].abs().t().unsqueeze(-1)
            weight.view(weight.shape[0], -1)[:, base.shape[1] :] = 0  # the pads of a ragged last group
            low = (zero.squeeze(-1) if isinstance(zero, Tensor) else zero) - g.lowest
            high = (g.levels - 1) - low
            fit = torch.maximum(
                weight.amax(-1) / torch.as_tensor(high).clamp_min(1),
                -weight.amin(-1) / torch.as_tensor(low).clamp_min(1),
            )
            out[:, rows] = fit.t()
        return out.clamp_min(2.0**-17)
