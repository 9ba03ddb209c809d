"""awq: the GEMM layout of AutoAWQ, 4 bit only; transformers (with gptqmodel), vLLM, SGLang.

    qweight  int32 [K, N / 8]   eight codes per word along N, in the order 0 2 4 6 1 3 5 7, lowest bits first
    qzeros   int32 [G, N / 8]   zero points, packed alike
    scales   fp16  [G, N]

The order lets a GPU take two neighbours out of a word with one mask. Only the layout is AWQ's: no activation
scaling was done, so none has to be undone. Logits agree within 1e-2 of the largest: the reader multiplies in
an order of its own.
"""

# The reader is an optional package.
# pyright: reportMissingImports=false

from collections.abc import Mapping, Sequence
from typing import Any

import lowbit_kernels as kernels
import torch
from torch import Tensor

from ..grid import Grid, IntGrid, PackedWeight, Weight
from ..model.matrices import Matrix
from .base import Exporter, LayerSpec, ReadBack, TensorSpecs, check_tensors, with_versions
from .gguf import float16_scale
from .gptq import OTHERS, from_parts, reject_float16, reject_groups, reject_mixture

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq(Exporter):
    name = "awq"
    language_only = "its readers build language models alone"
    quant_method = "awq"
    kv_server = "vllm"
    chat_flag = "--default-chat-template-kwargs"
    fused_by_servers = True
    needs = "gptqmodel optimum"
    checkpoint_names = True
    dense_experts = False
    reads_with = ("gptqmodel",)
    extra = "gptq"
    extra_note = " (in an environment of its own: it wants a newer torch than constraints.txt has)"
    tolerance = 1e-2

    def reject(self, grid: Grid, offset: bool = False) -> str | None:
        if isinstance(grid, IntGrid) and grid.bits != 4:
            return (
                f"awq holds 4 bits, not {grid.bits}; set quant.bits: 4, or export.format: "
                "compressed-tensors, gptq_v2 or native"
            )
        return reject_float16(self.name, grid, offset)

    def reject_width(self, grid: Grid, in_features: int) -> str | None:
        size = in_features if grid.group_size == -1 else grid.group_size
        if size not in (32, 64, 128, 256):  # what the CPU kernel of its reader knows
            return f"awq has groups of 32, 64, 128 and 256, not {size}; set quant.group_size, or {OTHERS}"
        return reject_groups(self.name, grid, in_features)

    def reject_model(self, layers: Mapping[str, LayerSpec]) -> list[str]:
        narrow = [(name, spec.shape[0]) for name, spec in layers.items() if spec.shape[0] % 8]
        return (
            super().reject_model(layers)
            + reject_mixture(self.name, layers)
            + [
                f"{name}: awq needs a multiple of 8 outputs, not {n}; exclude it, or {OTHERS}"
                for name, n in narrow
            ]
        )

    def specs(self, layer: LayerSpec) -> TensorSpecs:
        n, k = layer.shape
        groups = kernels.group_count(k, layer.grid.group_size)
        return {
            "qweight": ((k, n // 8), torch.int32),
            "qzeros": ((groups, n // 8), torch.int32),
            "scales": ((groups, n), torch.float16),
        }

    def pack(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, PackedWeight) and weight.residual is None and weight.offset is None
        zero = torch.full_like(weight.scale, 8, dtype=torch.uint8) if weight.zero is None else weight.zero
        return {
            "qweight": _pack(weight.unpack_codes().t()),
            "qzeros": _pack(zero),
            "scales": float16_scale(weight).t().contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> Weight:
        check_tensors(tensors, self.specs(layer), str(layer))
        codes = _unpack(tensors["qweight"]).t().contiguous()
        return from_parts(layer, codes, tensors["scales"], _unpack(tensors["qzeros"]))

    def model_config(self, layers: Mapping[str, LayerSpec], skipped: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": next(iter(layers.values())).grid.group_size,
            "zero_point": True,
            "modules_to_not_convert": [name for name in skipped if not name.startswith("re:")] or None,
        }

    def read_back(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> ReadBack:
        """Through gptqmodel's unpacking of the layout."""
        from gptqmodel.quantization.awq.utils.packing_utils import reverse_awq_order, unpack_awq

        codes, zero = reverse_awq_order(*unpack_awq(tensors["qweight"], tensors["qzeros"], 4), 4)
        assert zero is not None and isinstance(layer.grid, IntGrid)
        codes, zero = (codes & 15).to(torch.uint8), (zero & 15).to(torch.uint8)
        return ReadBack(codes.t(), tensors["scales"], None if layer.grid.symmetric else zero)

    def dense(self, model: Any, layer: str, matrix: Matrix | None, dtype: torch.dtype) -> Tensor | None:
        return None  # its layers multiply from the packed codes

    def reader(self) -> str:
        return with_versions("transformers", "gptqmodel")

    def serve(self, folder: str) -> str:
        return f"vllm serve {folder}"


def _pack(codes: Tensor) -> Tensor:
    """uint8 [R, C] -> int32 [R, C / 8]."""
    eights = codes.reshape(len(codes), -1, 8)
    words = torch.zeros(eights.shape[:2], dtype=torch.int32, device=codes.device)
    for place, column in enumerate(ORDER):
        words |= eights[..., column].to(torch.int32) << (4 * place)
    return words


def _unpack(words: Tensor) -> Tensor:
    """The inverse of `_pack`."""
    eights = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for place, column in enumerate(ORDER):
        eights[..., column] = (words >> (4 * place) & 15).to(torch.uint8)
    return eights.flatten(1)
