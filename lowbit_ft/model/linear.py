"""PackedLinear: the one layer class a quantized model ever sees. Composition: a packed base, perhaps an
adapter, a bias, and what its input is put through. One whose matrix multiplies something else than its input
as it comes (patches of an image: conv.py) says so by `rows`, `product` and `answer`.

Buffers carry the names of `Weight.to_tensors()` (codes, scale, zero, residual, planes, ...), so a state dict
reads `<layer>.codes`, `<layer>.scale`, and a safetensors file of them is our native format. There is no dense
`weight` parameter; `weight` dequantizes on every read and exists for tools that look at it. Only
train/sharding.py turns the buffers into frozen Parameters of the same names, because FSDP spreads nothing
else. The buffers are the same in every process and never change, so DistributedDataParallel, which cannot
send their integers around anyway, is told to leave them alone (`leave_out_of_ddp`).

Decoding on a CPU (bfloat16, at most DECODE_ROWS rows, eval mode, no adapter, no gradient wanted) goes through
PyTorch's int4 kernel where it can hold the grid: the same weight, repacked at the first such call and kept
beside the codes (half a byte per weight more), with sums that differ in their rounding
(lowbit_kernels/decode_cpu.py says by how much). Where that kernel cannot hold the grid, or the model is not
in bfloat16, and inputs are on a grid of one symmetric scale per token, any number of rows goes through the
product of integers (lowbit_kernels/int8_cpu.py; a byte per weight more). A layer keeps one copy at most.
Everything else is the packed op. What is measured or compared must not change path with the number of rows:
it runs under `packed_op_only`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lowbit_kernels import DECODE_ROWS, Int4Weight, Int8Weight, int4_linear, int8_linear
from torch import Tensor, nn

from ..grid import WEIGHTS, Grid, Weight
from .repacked import Repacked, holds_int4


class WeightAdapter(nn.Module):
    """What a PackedLinear asks of whatever trains its weight. Adapters (adapters/base.py) are such, one floor
    above.
    """

    kept: Any = None  # the codes of an optimizer step, where they are kept (adapters/step_codes.py)

    def forward(self, x: Tensor, base: Weight) -> Tensor:
        """x [..., K] -> [..., N] with the adapted weight."""
        raise AssertionError(f"{type(self).__name__} has no forward")

    def merge(self, base: Weight) -> Weight:
        """The adapted weight of the last forward, as it ships."""
        raise AssertionError(f"{type(self).__name__} has no merge")

    def begin_step(self, step: int, base: Weight) -> list[Any]:
        """Called before optimizer step `step` (0-based); what an optimizer has to know of it."""
        return []


class InputGrid(nn.Module):
    """What a PackedLinear asks of whatever puts its input on a grid (activations/, one floor above)."""

    @property
    def one_scale(self) -> bool:
        """Whether x^ is codes times a scale of the token (or of all of them), without a zero point."""
        return False

    def shared_codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., K] -> (codes int8 [..., K], scale fp32 [..., 1], NaN where x holds one); asked for where
        `one_scale`."""
        raise AssertionError(f"{type(self).__name__} has no codes")


class PackedLinear(nn.Module):
    """y = x W^T + bias, W [N, K] on a grid. With an adapter, W is the adapted weight; the base never
    changes.
    """

    bias: nn.Parameter | None
    fast_decode: bool = True  # `packed_op_only` turns it off
    unrounded: bool = False  # the base with its residual, without the adapter (model/unrounded.py)
    # What its input goes through before the packed op: a transform (an online rotation) that the unrounded
    # model needs too, then what puts it on a grid (activations/), which the unrounded model is spared.
    input_transform: nn.Module | None
    activation: InputGrid | None

    def __init__(self, base: Weight, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = base.shape
        self.grid: Grid = base.grid
        self.adapter: WeightAdapter | None = None
        self.input_transform, self.activation = None, None
        self._names = tuple(base.to_tensors())
        self._repacked: Repacked | None = None
        for name, tensor in base.to_tensors().items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def over(self, base: Weight) -> "PackedLinear":
        """The same layer with another weight: without adapter, and its input as it comes."""
        return PackedLinear(base, self.bias)

    @property
    def packed_names(self) -> tuple[str, ...]:
        """The names of the packed tensors, those of `Weight.to_tensors()`."""
        return self._names

    @property
    def base(self) -> Weight:
        """The packed base: a view of the buffers, made on the spot (no copies). Of a sharded layer: the
        gathered tensors inside its forward and backward, shards (DTensor) outside."""
        held = self._buffers if self._names[0] in self._buffers else self._parameters
        tensors = {name: held[name] for name in self._names}
        shape = (self.out_features, self.in_features)
        return WEIGHTS[self.grid.kind](shape=shape, grid=self.grid, **tensors)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def fill(self, base: Weight) -> None:
        """Take this weight as the base: a layer made by `empty` for its shape and grid."""
        tensors = base.to_tensors()
        assert tuple(tensors) == self._names and base.grid == self.grid, base.grid
        self._buffers.update(tensors)

    @property
    def has_residual(self) -> bool:
        """Whether the base keeps what its rounding threw away."""
        return "residual" in self._names

    def freeze_into_parameters(self) -> None:
        """The packed buffers become Parameters without gradient, same names and memory: what FSDP can
        spread.
        """
        for name in self._names:
            tensor = self._buffers.pop(name)
            assert tensor is not None
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """The dense weight [N, K] in fp32, dequantized on every read (the adapted one when there is an
        adapter).

        Some models multiply with a layer's weight instead of calling the layer (Mamba's dt_proj). Where
        gradients are wanted the weight is the layer's answer to the identity: the same bits, and what was
        read is trained."""
        if self.unrounded:
            return self.base.dequantize_unrounded()
        if self.adapter is not None and torch.is_grad_enabled():
            device = self.base.to_tensors()["scale"].device
            return self.adapter(torch.eye(self.in_features, device=device), self.base).t()
        return (self.base if self.adapter is None else self.adapter.merge(self.base)).dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype (autocast's, when it is on)."""
        x = self.rows(x)
        if (int8 := self._int8_for(x)) is not None and self.activation is not None:
            return self._answered(int8_linear(*self.activation.shared_codes(x), int8, x.dtype))
        x = self._on_grid(x)
        if self.unrounded:
            y = self.product(x, self.base.linear_unrounded)
        elif (adapter := self.adapter) is not None:
            base = self.base
            y = self.product(x, lambda rows: adapter(rows, base))
        elif (int4 := self._int4_for(x)) is not None:
            y = int4_linear(x, int4)
        else:
            y = self.product(x, self.base.linear)
        return self._answered(y)

    def forward_with(self, x: Tensor, op: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer with another weight: op, rows [..., K] -> [..., N], in the place of its own product."""
        return self._answered(self.product(self.seen(x), op))

    @property
    def row_key(self) -> object:
        """Layers of one key make the same rows of the same input."""
        return None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The last dimensions of what `rows` gives."""
        return (self.in_features,)

    def rows(self, x: Tensor) -> Tensor:
        """What the matrix multiplies of an input, [..., K]: in autocast's dtype, not yet on its grid."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x if self.input_transform is None else self.input_transform(x)

    def product(self, rows: Tensor, op: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows as `rows` gives them -> [..., N]. op: x [..., K] -> x W^T."""
        return op(rows)

    def answer(self, y: Tensor) -> Tensor:
        """[..., N] of the rows -> the output of the layer."""
        return y

    def _answered(self, y: Tensor) -> Tensor:
        return self.answer(y if self.bias is None else y + self.bias.to(y.dtype))

    def seen(self, x: Tensor) -> Tensor:
        """The rows of an input of the layer, on their grid."""
        return self._on_grid(self.rows(x))

    def _on_grid(self, x: Tensor) -> Tensor:
        return x if self.activation is None or self.unrounded else self.activation(x)

    def _int4_for(self, x: Tensor) -> Int4Weight | None:
        """The repacked weight when this call is one for the int4 kernel."""
        if x.dtype != torch.bfloat16 or x.numel() > DECODE_ROWS * self.in_features or not self._repacks(x):
            return None
        made = self._repacked_as(integers=False)
        return made if isinstance(made, Int4Weight) else None

    def _int8_for(self, x: Tensor) -> Int8Weight | None:
        """The bytes of the weight when this call is a product of integers: never where the int4 kernel serves
        the few rows of x, or would serve fewer."""
        if self.activation is None or not self.activation.one_scale or self.adapter is not None:
            return None
        if self.unrounded or not self._repacks(x):
            return None
        if x.dtype == torch.bfloat16 and holds_int4(self.base):
            return None
        made = self._repacked_as(integers=True)
        return made if isinstance(made, Int8Weight) else None

    def _repacks(self, x: Tensor) -> bool:
        """Whether this call may go by another kernel than the packed op."""
        if not self.fast_decode or self.training or x.device.type != "cpu" or not x.numel():
            return False
        if torch.compiler.is_compiling() or x.requires_grad and torch.is_grad_enabled():
            return False
        if getattr(getattr(self, "_hf_hook", None), "offload_buffers", False):
            return False  # accelerate takes the codes out of memory after each call: a copy would keep them
        return self._names[0] in self._buffers  # sharded: what is gathered is gone after the call

    def _repacked_as(self, integers: bool) -> Int4Weight | Int8Weight | None:
        """The copy of this kind. Made again when a buffer is another one, or was written to, or the copy is
        of the other kind."""
        tensors = [self._buffers[name] for name in self._names]
        held = self._repacked
        if held is None or held.integers != integers or not held.made_of(tensors):
            self._repacked = held = Repacked.make(self.base, integers)
        return held.weight

    def train(self, mode: bool = True) -> "PackedLinear":
        """Training has no use for the repacked copy: it is let go."""
        if mode:
            self._repacked = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        """`.to(dtype)` moves everything and casts the bias only: packed buffers and fp32 masters keep their
        dtypes.
        """

        def keep(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if tensor is self.bias or out.dtype == tensor.dtype:
                return out
            return tensor.to(out.device)

        self._repacked = None
        return super()._apply(keep, recurse)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, grid={self.grid}"
        )


class PackedInDtype(PackedLinear):
    """One that knows the dtype of the model, which `.to(dtype)` changes; `like` is an empty buffer that
    follows it."""

    like: Tensor

    def __init__(self, base: Weight, bias: Tensor | None, dtype: torch.dtype):
        super().__init__(base, bias)
        self.register_buffer(
            "like", torch.empty(0, dtype=dtype, device=base.to_tensors()["scale"].device), persistent=False
        )

    def fill(self, base: Weight) -> None:
        super().fill(base)
        self.like = torch.empty(0, dtype=self.like.dtype, device=base.to_tensors()["scale"].device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._buffers["like"] = fn(self.like)
        return self


class PackedEmbedding(PackedInDtype):
    """Rows of a packed matrix [V, H], looked up. It is never adapted: its codes are those of the first
    rounding.

    factor multiplies what is looked up (gemma's scaled embedding); a number, because transformers builds
    models without values. The dtype of the output is that of the model.
    """

    def __init__(self, base: Weight, dtype: torch.dtype, factor: float | None = None):
        super().__init__(base, None, dtype)
        self.factor = factor

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
        chosen = self.base.chosen(ids.reshape(-1))
        rows = (
            chosen.dequantize_unrounded(self.like.dtype)
            if self.unrounded
            else chosen.dequantize(self.like.dtype)
        ).view(*ids.shape, self.in_features)
        return (
            rows
            if self.factor is None
            else rows * torch.tensor(self.factor, dtype=rows.dtype, device=rows.device)
        )


def embedding_factor(embedding: nn.Embedding) -> float | None:
    """What a scaled embedding multiplies its rows with; None for a plain one."""
    value = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return None if value is None else float(value)


def leave_out_of_ddp(model: nn.Module, above: tuple[str, ...] = ()) -> None:
    """Tell DistributedDataParallel, whoever puts it around `model`, not to broadcast the packed buffers:
    every process has read the same ones, and gloo and NCCL have no 16-bit integers ("Invalid scalar type").

    DDP asks the module it is given for names as that module sees them. above: prefixes ("base_model.model.")
    under which a wrapper that forwards attributes to this model (PEFT's) will see them. Called again when
    layers have been wrapped. What was listed before stays: names that nothing has are of no consequence.
    """
    names = [
        f"{prefix}{name}.{key}"
        for name, layer in model.named_modules()
        if isinstance(layer, PackedLinear)
        for key in layer.packed_names
        for prefix in ("", *above)
    ]
    # Codes that adapters keep of rows that train no more.
    names += [
        f"{prefix}{name}"
        for name, buffer in model.named_buffers()
        if buffer.dtype == torch.int16
        for prefix in ("", *above)
    ]
    before = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    model._ddp_params_and_buffers_to_ignore = sorted({*before, *names})  # pyright: ignore[reportArgumentType]


@contextmanager
def in_memory(layer: PackedLinear) -> Iterator[None]:
    """Inside, the packed tensors are there, wherever a device map has put them between calls: accelerate's
    hook, which brings them for the layer's own forward, is asked to do so for whoever reads `base`.
    """
    hook = getattr(layer, "_hf_hook", None)
    held = (*layer.buffers(recurse=False), *layer.parameters(recurse=False))
    if hook is None or not any(tensor.is_meta for tensor in held):
        yield
        return
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, None)


def deployed(layer: PackedLinear, weight: Weight | None) -> PackedLinear:
    """The layer with `weight` (None: its own) and no residual, which only training reads."""
    with in_memory(layer):
        kept = (layer.base if weight is None else weight).without_residual()
        made = layer.over(kept)
        made.input_transform, made.activation = layer.input_transform, layer.activation
        return made.train(layer.training)


@contextmanager
def packed_op_only(model: nn.Module) -> Iterator[None]:
    """Inside, every layer runs the packed op whatever the number of rows: for numbers that are compared
    between stages.
    """
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    before = [layer.fast_decode for layer in layers]
    for layer in layers:
        layer.fast_decode = False
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.fast_decode = value
