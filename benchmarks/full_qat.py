"""Full QAT, the ceiling the adapters are measured against: LSQ fake quantization of every dense weight (arXiv
1902.08153).

    u = clip(w / S + z, 0, 2^b - 1);   W^ = S * (round(u) - z)        trains w [N, K] and S = s0 *
                                       exp(log_scale)

Straight-through on round; the scale's gradient is LSQ's by autograd. It keeps a dense fp32 master of every
weight and of its two Adam moments, which is what the packed base exists to avoid; for small models only.
"""

import torch
from lowbit_kernels.layout import grouped, ungrouped
from torch import Tensor, nn

from lowbit_ft.grid import PackedWeight
from lowbit_ft.grid.estimators import cast_scale, straight_through
from lowbit_ft.model.linear import PackedLinear


class FullQATLinear(nn.Module):
    """A trained dense weight behind its grid. start [N, K]: where the weight begins (before rounding)."""

    def __init__(self, layer: PackedLinear, start: Tensor):
        super().__init__()
        assert isinstance(layer.base, PackedWeight)
        self.base, self.bias, self.activation = layer.base, layer.bias, layer.activation
        self.dense = nn.Parameter(start.float().clone())
        self.log_scale = nn.Parameter(torch.zeros_like(layer.base.scale, dtype=torch.float32))

    def weight(self) -> Tensor:
        grid, k = self.base.grid, self.base.shape[1]
        scale = cast_scale(self.base.scale.float() * self.log_scale.exp(), grid.scale_dtype).t().unsqueeze(-1)
        zero = float(grid.levels // 2) if self.base.zero is None else self.base.zero.t().unsqueeze(-1).float()
        u = (grouped(self.dense, grid.group_size) / scale + zero).clamp(0, grid.levels - 1)
        return ungrouped((straight_through(u, u.detach().round()) - zero) * scale, k)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.activation is None else self.activation(x)
        return nn.functional.linear(x, self.weight().to(x.dtype), self.bias)
