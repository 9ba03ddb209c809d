"""LoTA-QAF: A and B are -1, 0 or 1, and their product moves codes by whole steps (arXiv 2505.18724).

    P = B A, integers, |P| <= r        W' = sign(P) where |P| > w, else 0        w = floor(threshold r)
    c' = clip(c + W')                  W^ = S (c' - z) + T                       S, z the base's own
    T = |S| mu        mu = mean over the group of (P - w (c' - c)) / w           offset: float; none: T = 0

The threshold is the rounding of lr_qat's op: with gain 1 / (2 w + 1) the product is below half a step where
|P| <= w, above it elsewhere, and below three halves as long as r < 3 w + 1.5. So P is never made, and the
merge is the forward's. D counts from the codes: a residual is left out (it is there for a teacher).

mu is what the threshold left over. The released code divides it by w, in training, merging and inference
alike; Eq. 4 does not. Here it is the code's, and only the native format holds a float offset. At the bounds
of the range W' is what was really moved, as there. Gradients are straight-through on the threshold, and cut
where a code is clipped (theirs go on); t-SignSGD looks at their signs and order alone.

A starts as Kaiming's normal numbers cut at 0.75 of their mean size, B at 0. `train.optimizer: t_signsgd` is
the optimizer; another one leaves the three values, and merge refuses that.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from lowbit_kernels import group_sums
from lowbit_kernels.layout import grouped
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..grid import GridArgs, PackedWeight, Weight
from ..grid.estimators import cast
from .base import Adapter, AdapterConfig
from .lr_qat import signs
from .patterns import RankPattern


class LotaConfig(AdapterConfig, RankPattern):
    ternary: ClassVar[bool] = True
    reads_residual: ClassVar[bool] = False

    method: Literal["lota"] = "lota"
    rank: int = Field(default=64, ge=1, le=1024)
    threshold: float = Field(
        default=0.75,
        gt=0,
        lt=1,
        description="share of the rank that |B A| must pass for a code to move by one",
    )
    offset: Literal["none", "float"] = Field(
        default="none",
        description="float: the paper's offset factor, the mean of what the threshold left over, per group; "
        "only the native format holds it. none: codes alone move, and every format holds them",
    )

    @property
    def omega(self) -> int:
        """The largest |B A| that moves nothing."""
        return math.floor(self.threshold * self.rank)

    @property
    def gain(self) -> float:
        """What makes half a step of a product between omega and omega + 1."""
        return 1 / (2 * self.omega + 1)

    @model_validator(mode="after")
    def _one_step(self) -> "LotaConfig":
        for rank in self.ranks(self.rank):
            if rank >= 1.5 * (2 * math.floor(self.threshold * rank) + 1):
                raise ValueError(
                    f"threshold {self.threshold:g} of rank {rank}: a product of {rank} would move a code by "
                    "more than one; set threshold: 0.34 or more (the paper's: 0.75)"
                )
        return self

    @property
    def ships_offset(self) -> bool:
        return self.offset == "float"

    @property
    def trains_scales(self) -> bool:
        return False

    def of_layer(self, layer_name: str) -> "LotaConfig":
        return self.model_copy(update=self.at(layer_name))

    def build(self, base: Weight, weight: Tensor | None = None) -> "Lota":
        assert isinstance(base, PackedWeight)
        return Lota(self, base)


class Lota(Adapter):
    config: LotaConfig

    def __init__(self, config: LotaConfig, base: PackedWeight):
        super().__init__(config)
        (n, k), device = base.shape, base.codes.device
        # Drawn on the CPU, as low_rank.py does. Its size is cut away: only the order of the numbers is left.
        a = torch.randn(config.rank, k, device="cpu")
        a = torch.where(a.abs() > 0.75 * a.abs().mean(), a.sign(), 0.0)
        self.A = nn.Parameter(a.to(device))
        self.B = nn.Parameter(torch.zeros(n, config.rank, device=device))

    def grid_args(self, base: PackedWeight) -> GridArgs:
        args = self.moved(base)
        return args if self.config.offset == "none" else self.with_offset(base, args, base.codes_of(args))

    def moved(self, base: PackedWeight) -> GridArgs:
        """The codes' part."""
        unit = signs(base)
        return GridArgs(
            scale=base.scale.float(),
            zero=base.zero,
            a=self.A,
            b=self.B,
            from_codes=True,
            gain=self.config.gain,
            units="grid" if unit is None else "weight",
            unit=unit,
        )

    def with_offset(self, base: PackedWeight, args: GridArgs, codes: Tensor) -> GridArgs:
        """The same with T; codes: what `args` makes.

        All sums are of integers and exact in any order, and what follows is one division and one product: so
        a compiler, autocast or another device finds the same T.
        """
        size, omega = base.grid.group_size, self.config.omega
        bits, k = base.grid.bits, base.shape[1]
        with torch.autocast(codes.device.type, enabled=False):
            product = self.B @ grouped(self.A, size).sum(-1)  # [N, G]
        moved = group_sums(codes, bits, k, size) - group_sums(base.codes, bits, k, size)  # [G, N]
        moved = moved if args.unit is None else moved * args.unit.float()
        inputs = [k] if size == -1 else [min(size, k - first) for first in range(0, k, size)]
        divisor = max(1, omega) * torch.tensor(inputs, dtype=torch.float32, device=codes.device)[:, None]
        mean = (product.t() - omega * moved) / divisor
        offset = cast(base.scale.float().abs() * mean, base.grid.scale_dtype)
        return replace(args, offset=offset, ships_offset=True)

    def forward(self, x: Tensor, base: Weight) -> Tensor:
        assert isinstance(base, PackedWeight)
        args = self.moved(base)
        codes = self.step_codes(base, args)
        if self.config.offset == "float":
            codes = base.codes_of(args) if codes is None else codes
            args = self.with_offset(base, args, codes)
        return base.linear(x, args, codes)

    def merge(self, base: Weight) -> Weight:
        if wrong := self.misfit(dict(self.named_parameters())):
            raise ValueError(
                f"lota: {wrong}; train it with t-SignSGD (train.optimizer: t_signsgd; in a Trainer or a loop "
                "of your own: lowbit_ft.train.optimizers.t_signsgd.TSignSGD)"
            )
        return super().merge(base)

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        for name in ("A", "B"):
            value = tensors.get(name)
            if value is not None and not ((value == 0) | (value.abs() == 1)).all():
                return f"{name}: holds other numbers than -1, 0 and 1"
        return None
