"""What stands in the skeleton of a model for its packed layers while it is traced: the ONNX operators that
compute them (the table is in onnx.py), and around them, in plain torch, what training does to their input.

Inputs are put on their grid by the very functions of training (activations/), so the graph has the same
divisions, roundings and clips, in fp32: codes are those of training bit for bit. QuantizeLinear would divide
by the scale where training multiplies with 1 / scale, and DynamicQuantizeLinear has one scale for a whole
tensor, of uint8, which no kind of ours is. Only in front of MatMulInteger there is a QuantizeLinear, of
x / scale by a scale of 1: rounding, clipping and the step to uint8 in one.

A static scale and its zero point are tensors of the graph, <layer>.input_scale and .input_zero, and not
folded into what is computed with them: verify reads them there.

MatMulInteger takes uint8 on both sides: int8 weights are faster (182 microseconds to 330), but processors
without VNNI saturate their sums at 16 bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation, Scheme, activation_of
from ..grid import IntGrid
from ..model.conv import Patches
from ..model.linear import embedding_factor
from .base import LayerSpec, TensorSpecs
from .onnx import block_of, stored_bits

OPSET = 21  # the first whose DequantizeLinear has blocks
INPUT = "input_"  # before "scale" and "zero" of what an input is on


def hollow(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take the memory of one number. Each is a storage of its own, by which the tracer knows tied
    tensors."""
    return torch.zeros(1, dtype=dtype).expand(shape)


def input_constants(scheme: Scheme | None) -> dict[str, Tensor]:
    """By local name what a static scheme is made of, fp32, of segments one behind the other; {} of others."""
    if scheme is None or scheme.dynamic:
        return {}
    found = {"scale": scheme.scale, "zero": scheme.zero}
    return {f"{INPUT}{name}": torch.tensor(v, dtype=torch.float32) for name, v in found.items() if v}


class OnnxLinear(nn.Module):
    """[..., K] -> [..., N]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, spec: LayerSpec, tensors: TensorSpecs, bias: nn.Parameter | None):
        super().__init__()
        assert isinstance(spec.grid, IntGrid)
        (self.n, self.k), self.grid = spec.shape, spec.grid
        for name, (shape, dtype) in tensors.items():
            self.register_buffer(name, hollow(shape, dtype))
        self.bias = bias
        self.activation = None if spec.activation is None else activation_of(spec.activation)
        constants = input_constants(spec.activation)
        for name, values in constants.items():
            self.register_buffer(name, values)
        parts: Any = getattr(self.activation, "parts", (self.activation,)) if constants else ()
        for number, part in enumerate(parts):
            part.numbers = partial(self._numbers, number, len(parts))
        self.integer = (
            stored_bits(self.grid) == 8
            and (self.grid.group_size == -1 or self.grid.group_size >= self.k)
            and isinstance(self.activation, Activation)
            and self.activation.one_scale
        )

    def _numbers(self, number: int, parts: int, what: str) -> Tensor:
        """Of the input's scales or zero points those of a segment."""
        found = self.get_buffer(f"{INPUT}{what}")
        return found if parts == 1 else found.view(parts, -1)[number]

    def forward(self, x: Tensor) -> Tensor:
        if self.integer and self.activation is not None:
            y = self._integers(x, self.activation)
        else:
            y = self._product(x if self.activation is None else on_grid(self.activation, x))
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor) -> Tensor:
        return self._dequantized(x) if stored_bits(self.grid) == 8 else self._packed(x)

    def _packed(self, x: Tensor) -> Tensor:
        sizes = {"K": self.k, "N": self.n, "bits": stored_bits(self.grid)}
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            [x, *_present(self, "codes", "scale", "zero")],
            {**sizes, "block_size": block_of(self.grid, self.k), "accuracy_level": 1},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.n),
            version=1,
        )

    def _dequantized(self, x: Tensor) -> Tensor:
        return x @ self._weight().t()

    def _weight(self) -> Tensor:
        """The dense weight [N, K], made in the graph."""
        if stored_bits(self.grid) != 8:
            return _looked_up(self, torch.arange(self.n))[:, : self.k]
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            _present(self, "codes", "scale", "zero"),
            {"axis": 1, "block_size": block_of(self.grid, self.k)},
            dtype=torch.float32,
            shape=(self.n, self.k),
            version=OPSET,
        )

    def _integers(self, x: Tensor, activation: Any) -> Tensor:
        scheme = activation.scheme()
        scale, _ = activation.scales(x)
        middle = torch.tensor(128, dtype=torch.uint8)
        stepped = (x * activation.spread(1 / scale, x)).clamp(scheme.lowest, scheme.highest)
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear",
            [stepped, torch.tensor(1.0), middle],
            dtype=torch.uint8,
            shape=x.shape,
            version=OPSET,
        )
        assert self.zero is not None
        sums = torch.onnx.ops.symbolic(
            "MatMulInteger",
            [codes, self.codes.t(), middle, self.zero[:, 0]],
            dtype=torch.int32,
            shape=(*x.shape[:-1], self.n),
            version=10,
        )
        # One after the other: of sums times a product of scales, plus a bias, ONNX Runtime 1.32 makes one
        # operator when it opens the file, which multiplies the bias, too, with the scales of tokens.
        return sums.float() * scale * self.scale[:, 0]


class OnnxConv(OnnxLinear):
    """[B, C, H, W] -> [B, N, H', W']: ONNX's Conv with the dense weight. Where the input is on scales of its
    patches it is the product of model/conv.py, and the patches are made in the graph."""

    def __init__(
        self, spec: LayerSpec, tensors: TensorSpecs, conv: nn.Conv1d | nn.Conv2d, bias: nn.Parameter | None
    ):
        super().__init__(spec, tensors, bias)
        self.patches = Patches.of(conv)
        self.integer = self.integer and self.patches.groups == 1
        scheme = spec.activation  # one scale that is known puts pixels where it puts those of patches
        self.pixels = scheme is None or (scheme.kind in ("tensor", "dual") and not scheme.dynamic)
        # For models that look at its dtype; what would multiply with it cannot be traced.
        self.register_buffer("weight", torch.empty(conv.weight.shape, device="meta"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.pixels:
            return self.patches.answer(super().forward(self.patches.rows(x)))
        x = x if self.activation is None else on_grid(self.activation, x)
        return self.patches.convolve(x, self._weight(), self.bias)

    def _product(self, x: Tensor) -> Tensor:
        return self.patches.product(x, super()._product)


class OnnxEmbedding(nn.Module):
    """ids [...] -> [..., H]."""

    codes: Tensor

    def __init__(self, spec: LayerSpec, tensors: TensorSpecs, embedding: nn.Embedding):
        super().__init__()
        (self.num_embeddings, self.k), self.grid = spec.shape, spec.grid
        self.factor = embedding_factor(embedding)
        for name, (shape, dtype) in tensors.items():
            self.register_buffer(name, hollow(shape, dtype))

    def forward(self, ids: Tensor) -> Tensor:
        rows = _looked_up(self, ids)
        return rows if self.factor is None else rows * self.factor


def onnx_in_place_of(dense: nn.Module, spec: LayerSpec, tensors: TensorSpecs) -> nn.Module:
    """What stands in for a dense layer that is packed."""
    if isinstance(dense, nn.Embedding):
        return OnnxEmbedding(spec, tensors, dense)
    bias: Any = getattr(dense, "bias", None)
    if isinstance(dense, nn.Conv1d | nn.Conv2d):
        return OnnxConv(spec, tensors, dense, bias)
    return OnnxLinear(spec, tensors, bias)


def on_grid(activation: Any, x: Tensor) -> Tensor:
    """x^ as training has it (activations/base.py)."""
    codes, scale, zero = activation.codes(x)
    values = codes.float()
    if zero is not None:
        values = values - activation.spread(zero.float(), x)
    return values * activation.spread(scale, x)


def _looked_up(layer: OnnxLinear | OnnxEmbedding, ids: Tensor) -> Tensor:
    """Rows [..., K] of a packed weight, K filled up to whole blocks."""
    codes, scale, *zero = _present(layer, "codes", "scale", "zero")
    codes, bits = codes.flatten(1), stored_bits(layer.grid)
    return torch.onnx.ops.symbolic(
        "com.microsoft::GatherBlockQuantized",
        [codes, ids, scale, *zero],
        {"bits": bits, "block_size": block_of(layer.grid, layer.k), "gather_axis": 0, "quantize_axis": 1},
        dtype=torch.float32,
        shape=(*ids.shape, codes.shape[1] * 8 // bits),
        version=1,
    )


def _present(layer: nn.Module, *names: str) -> list[Tensor]:
    return [layer.get_buffer(name) for name in names if name in layer._buffers]
