"""torchao: `IntxUnpackedToInt8Tensor`, which transformers loads with torchao and torch.export takes to
ExecuTorch.

    _weight_qdata       int8 [N, K]   code - 2^(b-1); one byte per code, whatever the bits
    _weight_scale       [N, G]        in the dtype of our scales
    _weight_zero_point  int8 [N, G]   zero - 2^(b-1)

What the three are (bits, group, dtype) stands in the metadata of every safetensors file, as torchao's own
save writes it; without it they do not load. The file is as large as 8 bits: this format is for tools that
read torchao, not for saving memory on a disk. W = (qdata - zero_point) * scale there too, in the model's
dtype, so weights and logits are equal bit for bit.
"""

# The reader is an optional package.
# pyright: reportMissingImports=false

import json
from collections.abc import Mapping, Sequence
from typing import Any

import lowbit_kernels as kernels
import torch
from torch import Tensor

from ..grid import BinaryGrid, Grid, IntGrid, PackedWeight, Weight
from ..model.matrices import Matrix
from .base import Exporter, LayerSpec, ReadBack, TensorSpecs, check_tensors, check_values, with_versions
from .compressed_tensors import reject_cast
from .gptq import reject_groups, reject_mixture


class Torchao(Exporter):
    name = "torchao"
    language_only = "its folders were tried with language models alone"
    quant_method = "torchao"
    needs = "torchao"
    dense_experts = False
    reads_with = ("torchao",)
    extra = "torchao"

    def reject(self, grid: Grid, offset: bool = False) -> str | None:
        if isinstance(grid, BinaryGrid):
            return "torchao has no sign planes; set export.format: native"
        if offset:
            return (
                "torchao holds no float offset per group; set export.format: native, or train an "
                "integer offset"
            )
        return None

    def reject_dtype(self, grid: Grid, dtype: str) -> str | None:
        return reject_cast(grid, dtype)

    def reject_width(self, grid: Grid, in_features: int) -> str | None:
        return reject_groups(self.name, grid, in_features)

    def reject_model(self, layers: Mapping[str, LayerSpec]) -> list[str]:
        return super().reject_model(layers) + reject_mixture(self.name, layers)

    def specs(self, layer: LayerSpec) -> TensorSpecs:
        (n, k), grid = layer.shape, layer.grid
        groups = kernels.group_count(k, grid.group_size)
        return {
            "_weight_qdata": ((n, k), torch.int8),
            "_weight_scale": ((n, groups), getattr(torch, grid.scale_dtype)),
            "_weight_zero_point": ((n, groups), torch.int8),
        }

    def pack(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, PackedWeight) and weight.residual is None and weight.offset is None
        half, scale = weight.grid.levels // 2, weight.scale.t().contiguous()
        zero = torch.full_like(weight.scale, half, dtype=torch.uint8) if weight.zero is None else weight.zero
        return {
            "_weight_qdata": _signed(weight.unpack_codes(), half),
            "_weight_scale": scale,
            "_weight_zero_point": _signed(zero.t().contiguous(), half),
        }

    def unpack(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> Weight:
        check_tensors(tensors, self.specs(layer), str(layer))
        grid = layer.grid
        assert isinstance(grid, IntGrid)
        half = grid.levels // 2
        codes, zero = (tensors[f"_weight_{key}"].to(torch.int16) + half for key in ("qdata", "zero_point"))
        if int(codes.min()) < 0 or int(codes.max()) >= grid.levels:
            raise ValueError(f"{layer}: has codes beyond {grid.bits} bits; not a file of ours")
        if grid.symmetric and not bool((zero == half).all()):
            raise ValueError(f"{layer}: has zero points other than {half}; not a file of ours")
        weight = PackedWeight(
            codes=kernels.pack(codes.to(torch.uint8), grid.bits),
            scale=tensors["_weight_scale"].t().contiguous(),
            zero=None if grid.symmetric else zero.to(torch.uint8).t().contiguous(),
            shape=layer.shape,
            grid=grid,
        )
        check_values(weight)
        return weight

    def model_config(self, layers: Mapping[str, LayerSpec], skipped: Sequence[str]) -> dict[str, Any]:
        grid = next(iter(layers.values())).grid
        assert isinstance(grid, IntGrid)
        row = grid.group_size == -1
        granularity = {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
        group = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": grid.group_size}}
        mapping = "SYMMETRIC" if grid.symmetric else "ASYMMETRIC"
        return {
            "quant_method": "torchao",
            "quant_type": {
                "default": {
                    "_type": "IntxWeightOnlyConfig",
                    "_version": 2,
                    "_data": {
                        "weight_dtype": {"_type": "torch.dtype", "_data": f"int{grid.bits}"},
                        "granularity": granularity if row else group,
                        "mapping_type": {"_type": "MappingType", "_data": mapping},
                    },
                }
            },
            "modules_to_not_convert": [name for name in skipped if not name.startswith("re:")],
            "include_input_output_embeddings": False,
        }

    def file_metadata(self, layers: Mapping[str, LayerSpec], dtype: torch.dtype) -> dict[str, str]:
        """What torchao needs to put the tensors of a layer together."""
        found = {}
        for name, spec in layers.items():
            size = spec.shape[1] if spec.grid.group_size == -1 else spec.grid.group_size
            data = {
                "target_dtype": {"_type": "torch.dtype", "_data": f"int{spec.grid.bits}"},
                "block_size": [1, size],
                "dtype": {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")},
                "activation_quantization": None,
            }
            names = ["qdata", "scale", "zero_point"]
            found[f"{name}.weight"] = json.dumps(
                {"_type": "IntxUnpackedToInt8Tensor", "_data": data, "_tensor_data_names": names}
            )
        return found | {"tensor_names": json.dumps(list(found))}

    def read_back(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> ReadBack:
        """Through torchao's tensor, whose products with scales of 1 are the codes."""
        from torchao.quantization import IntxUnpackedToInt8Tensor

        (n, k), grid = layer.shape, layer.grid
        assert isinstance(grid, IntGrid)
        half, size = grid.levels // 2, k if grid.group_size == -1 else grid.group_size
        kind, ones = getattr(torch, f"int{grid.bits}"), torch.ones(n, k // size)

        def values(qdata: Tensor) -> Tensor:
            zero = tensors["_weight_zero_point"]
            return IntxUnpackedToInt8Tensor(
                qdata, ones, zero, kind, [1, size], torch.float32, None
            ).dequantize()

        at_zero = values(torch.zeros_like(tensors["_weight_qdata"]))  # minus the zero point
        codes = (values(tensors["_weight_qdata"]) - at_zero + half).to(torch.uint8)
        zero = (half - at_zero[:, ::size]).t().to(torch.uint8)
        return ReadBack(codes, tensors["_weight_scale"].t(), None if grid.symmetric else zero)

    def dense(self, model: Any, layer: str, matrix: Matrix | None, dtype: torch.dtype) -> Tensor | None:
        return model.get_submodule(layer).weight.dequantize().to(dtype)

    def reader(self) -> str:
        return with_versions("transformers", "torchao")

    def serve(self, folder: str) -> str:
        return f"lowbit-ft generate {folder}"


def _signed(values: Tensor, half: int) -> Tensor:
    """uint8 - half as int8."""
    return (values.to(torch.int16) - half).to(torch.int8)
