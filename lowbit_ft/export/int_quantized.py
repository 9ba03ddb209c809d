"""compressed-tensors `int-quantized`: W8A8 for integer products, as vLLM runs it on GPUs and CPUs.

    weight         int8 [N, K]   code - 128
    weight_scale   fp32 [N, 1]   bf16-valued, as in compressed_tensors.py

Rows of 8 symmetric bits whose inputs are 8 bits per token: the one scheme whose weights servers want
unpacked, because their integer product (cutlass; oneDNN on a CPU) reads bytes. Symmetric inputs, or with a
zero point. Every other grid with quantized inputs goes by `compressed-tensors`, packed.
"""

from collections.abc import Mapping

import lowbit_kernels as kernels
import torch
from torch import Tensor

from ..activations import Scheme
from ..grid import Grid, IntGrid, PackedWeight, Weight
from .base import LayerSpec, ReadBack, TensorSpecs, check_tensors, check_values
from .compressed_tensors import CompressedTensors

_HALF = 128


class IntQuantized(CompressedTensors):
    name = "int-quantized"
    layout = "int-quantized"
    needs_activations = True

    def reject(self, grid: Grid, offset: bool = False) -> str | None:
        if reason := super().reject(grid, offset):
            return reason
        assert isinstance(grid, IntGrid)
        if grid.bits == 8 and grid.group_size == -1 and grid.symmetric:
            return None
        return (
            "int-quantized has whole rows of 8 symmetric bits; set quant.bits: 8 and quant.group_size: -1, "
            "or export.format: compressed-tensors, which packs every grid"
        )

    def reject_activation(self, scheme: Scheme, grid: Grid, in_features: int | None = None) -> str | None:
        if scheme.segments:
            return (
                "int-quantized has one scale per token; set activations.segments: none, or export.format: "
                "compressed-tensors, where segments of one width are groups, or native"
            )
        if scheme.kind == "token" and scheme.bits == 8 and scheme.whole_range:
            return None
        return (
            "int-quantized has inputs of 8 bits per token, not clipped; set activations.bits: 8, kind: "
            "token, clip: 1.0 and learn: false, or export.format: native"
        )

    def specs(self, layer: LayerSpec) -> TensorSpecs:
        return {"weight": (layer.shape, torch.int8), "weight_scale": ((layer.shape[0], 1), torch.float32)}

    def pack(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, PackedWeight) and weight.residual is None and weight.offset is None
        codes = weight.unpack_codes().to(torch.int16) - _HALF
        scale = weight.scale.t().to(torch.float32).contiguous()
        return {"weight": codes.to(torch.int8), "weight_scale": scale}

    def unpack(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> Weight:
        assert isinstance(layer.grid, IntGrid)
        check_tensors(tensors, self.specs(layer), str(layer))
        scale = tensors["weight_scale"].t().to(getattr(torch, layer.grid.scale_dtype)).contiguous()
        if not torch.equal(scale.float(), tensors["weight_scale"].t()):
            raise ValueError(f"{layer}: weight_scale has values that are not {layer.grid.scale_dtype}")
        codes = kernels.pack((tensors["weight"].to(torch.int16) + _HALF).to(torch.uint8), layer.grid.bits)
        weight = PackedWeight(codes=codes, scale=scale, shape=layer.shape, grid=layer.grid)
        check_values(weight)
        return weight

    def read_back(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> ReadBack:
        # The library reads the bytes as they are.
        return ReadBack(
            (tensors["weight"].to(torch.int16) + _HALF).to(torch.uint8), tensors["weight_scale"].t()
        )
