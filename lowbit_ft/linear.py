"""PackedLinear: the one layer class a quantized model ever sees. Composition: a packed base, perhaps an adapter, a bias.

Buffers carry the names of `Weight.to_tensors()` (codes, scale, zero, residual, planes, ...), so a state dict reads
`<layer>.codes`, `<layer>.scale`, and a safetensors file of them is our native format. There is no dense `weight` parameter;
`weight` dequantizes on every read and exists for tools that look at it. Only sharding.py turns the buffers into frozen
Parameters of the same names, because FSDP spreads nothing else.
"""

import torch
from torch import Tensor, nn

from .adapters import Adapter
from .grid import WEIGHTS, Grid, Weight, empty_weight


class PackedLinear(nn.Module):
    """y = x W^T + bias, W [N, K] on a grid. With an adapter, W is the adapted weight; the base never changes."""

    bias: nn.Parameter | None

    def __init__(self, base: Weight, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = base.shape
        self.grid: Grid = base.grid
        self.adapter: Adapter | None = None
        self._names = tuple(base.to_tensors())
        for name, tensor in base.to_tensors().items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool, grid: Grid, device: torch.device | str, dtype: torch.dtype, offset: bool = False
    ) -> "PackedLinear":
        """A layer whose tensors a checkpoint will fill."""
        base = empty_weight((out_features, in_features), grid, device, offset)
        return cls(base, torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @property
    def base(self) -> Weight:
        """The packed base: a view of the buffers, made on the spot (no copies). Of a sharded layer: the gathered tensors inside
        its forward and backward, shards (DTensor) outside."""
        held = self._buffers if self._names[0] in self._buffers else self._parameters
        tensors = {name: held[name] for name in self._names}
        shape = (self.out_features, self.in_features)
        return WEIGHTS[self.grid.name](shape=shape, grid=self.grid, **tensors)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def freeze_into_parameters(self) -> None:
        """The packed buffers become Parameters without gradient, same names and memory: what FSDP can spread."""
        for name in self._names:
            tensor = self._buffers.pop(name)
            assert tensor is not None
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """The dense weight [N, K] in fp32, dequantized on every read (the adapted one when there is an adapter)."""
        return (self.base if self.adapter is None else self.adapter.merge(self.base)).dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype (autocast's, when it is on)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        base = self.base
        y = base.linear(x) if self.adapter is None else self.adapter(x, base)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse=True):
        """`.to(dtype)` moves everything and casts the bias only: packed buffers and fp32 masters keep their dtypes."""

        def keep(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if tensor is self.bias or out.dtype == tensor.dtype:
                return out
            return tensor.to(out.device)

        return super()._apply(keep, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, grid={self.grid}"
