"""PackedLinear: the one layer class a quantized model ever sees. Composition: a packed base, perhaps an adapter, a bias.

Buffers carry the names of `Weight.to_tensors()` (codes, scale, zero, residual, planes, ...), so a state dict reads
`<layer>.codes`, `<layer>.scale`, and a safetensors file of them is our native format. There is no dense `weight` parameter;
`weight` dequantizes on every read and exists for tools that look at it.
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
        """The packed base: a view of the buffers, made on the spot (no copies)."""
        tensors = {name: self._buffers[name] for name in self._names}
        shape = (self.out_features, self.in_features)
        return WEIGHTS[self.grid.name](shape=shape, grid=self.grid, **tensors)  # pyright: ignore[reportArgumentType, reportCallIssue]

    @property
    def weight(self) -> Tensor:
        """The dense weight [N, K] in fp32, dequantized on every read (the adapted one when there is an adapter).

        Some models multiply with a layer's weight instead of calling the layer (Mamba's dt_proj). Where gradients are wanted the weight
        is the layer's answer to the identity: the same bits, and what was read is trained."""
        if self.adapter is not None and torch.is_grad_enabled():
            device = self.base.to_tensors()["scale"].device
            return self.adapter(torch.eye(self.in_features, device=device), self.base).t()
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


class PackedEmbedding(PackedLinear):
    """Rows of a packed matrix [V, H], looked up. It is never adapted: its codes are those of the first rounding.

    factor multiplies what is looked up (gemma's scaled embedding); a number, because transformers builds models without values. The dtype of the output is that of the model, which `.to(dtype)`
    changes; `like` is an empty buffer that follows it.
    """

    like: Tensor

    def __init__(self, base: Weight, dtype: torch.dtype, factor: float | None = None):
        super().__init__(base)
        self.factor = factor
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=base.to_tensors()["scale"].device), persistent=False)

    @classmethod
    def in_place_of(cls, embedding: nn.Embedding, base: Weight, dtype: torch.dtype) -> "PackedEmbedding":
        """What takes the place of a model's own embedding."""
        return cls(base, dtype, embedding_factor(embedding))

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., H]."""
        rows = self.base.chosen(ids.reshape(-1)).dequantize(self.like.dtype).view(*ids.shape, self.in_features)
        return rows if self.factor is None else rows * torch.tensor(self.factor, dtype=rows.dtype, device=rows.device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._buffers["like"] = fn(self.like)
        return self


def embedding_factor(embedding: nn.Embedding) -> float | None:
    """What a scaled embedding multiplies its rows with; None for a plain one."""
    value = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return None if value is None else float(value)
