"""DL-QAT: a trained magnitude per group outside, a low-rank update of the weight inside a frozen grid (arXiv
2504.09223).

    W^ = m * s0 * clip(round(Phi0 + alpha/r * B A / s0))        m starts at 1

The paper's body gives the decomposition in words (group-wise magnitude; LoRA inside a predefined quantization
space); this is our reading of it. D is in units of the weight, so groups with a small scale move more steps
per unit of D: the only difference from LR-QAT besides the scale's parameter. Gradients: dm = s0 * sum dW q,
dD = m M dW.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ..grid import GridArgs, PackedWeight, Weight
from ..grid.estimators import cast_scale, scale_gradient
from .base import LowRankOptions
from .low_rank import LowRank


class DLQATConfig(LowRankOptions):
    method: Literal["dl_qat"] = "dl_qat"

    def build(self, base: Weight, weight: Tensor | None = None) -> "DLQAT":
        assert isinstance(base, PackedWeight)
        return DLQAT(self, base, weight)


class DLQAT(LowRank):
    def __init__(self, config: DLQATConfig, base: PackedWeight, weight: Tensor | None):
        super().__init__(config)
        self.factor = config.scale_gradient_factor(base)
        self.start(base, weight, unit=base.scale)
        ones = torch.ones(base.scale.shape, dtype=torch.float32, device=base.scale.device)
        self.magnitude = nn.Parameter(ones, requires_grad=config.train_scale)

    def grid_args(self, base: PackedWeight) -> GridArgs:
        magnitude = self.magnitude if self.factor == 1.0 else scale_gradient(self.magnitude, self.factor)
        a, b = self.factors()
        return GridArgs(
            scale=cast_scale(magnitude * base.scale.float(), base.grid.scale_dtype),
            zero=base.zero,
            a=a,
            b=b,
            gain=self.config.gain,
            units="weight",
            clip_first=self.config.clip == "clip_then_round",
            mask=self.mask,
            **self.config.gradient_options(),
        )
