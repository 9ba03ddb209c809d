"""AlphaTuning: frozen sign planes, trained plane scales (arXiv 2210.03858, Eq. 1-4).

    W^ = sum_k alpha_k b_k,  b_k in {-1, +1};    alpha_k = alpha0_k * exp(plane_scale_k);    dalpha_k = sum dW
                             b_k

`planes: first` trains alpha_1 only (the paper's choice: the largest plane), `all` every plane. The bits are
shared: a task is a set of plane scales, and switching tasks swaps them. Merging is exact by definition. The
start (greedy or alternating) is quant.calibrate.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from lowbit_kernels import exact_exp
from torch import Tensor, nn

from ..grid import BinaryWeight, PlaneArgs, Weight
from ..grid.estimators import cast_scale, scale_gradient
from .base import Adapter, AdapterConfig
from .scale import sum_of_factors


class AlphaTuningConfig(AdapterConfig):
    grid_name: ClassVar[str] = "binary"
    rounds_codes: ClassVar[bool] = False

    method: Literal["alpha_tuning"] = "alpha_tuning"
    planes: Literal["first", "all"] = "all"
    divide_gradient_by_group: bool = False  # the paper's 1/g_L; nearly inert under Adam

    def build(self, base: Weight, weight: Tensor | None = None) -> "AlphaTuning":
        assert isinstance(base, BinaryWeight)
        return AlphaTuning(self, base)


class AlphaTuning(Adapter):
    def __init__(self, config: AlphaTuningConfig, base: BinaryWeight):
        super().__init__(config)
        size = base.shape[1] if base.grid.group_size == -1 else base.grid.group_size
        self.factor = 1.0 / size if config.divide_gradient_by_group else 1.0
        trained = 1 if config.planes == "first" else base.grid.bits
        shape = (trained, *base.scale.shape[1:])
        self.plane_scale = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=base.scale.device))

    def plane_args(self, base: BinaryWeight) -> PlaneArgs:
        trained, alpha = self.plane_scale.shape[0], base.scale.float()
        log = self.plane_scale if self.factor == 1.0 else scale_gradient(self.plane_scale, self.factor)
        live = cast_scale(alpha[:trained] * exact_exp(log), base.grid.scale_dtype)
        return PlaneArgs(scale=torch.cat([live, alpha[trained:]]))

    def sum_of(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
        return sum_of_factors("plane_scale", adapters, weights)
