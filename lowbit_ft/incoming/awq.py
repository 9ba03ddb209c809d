"""AWQ files: AutoAWQ's GEMM layout, 4 bit.

qweight  int32 [K, N / 8]   eight codes per word along N, nibble i holds column ORDER[i] of the eight
qzeros   int32 [G, N / 8]   zero points, the same way
scales   fp16  [G, N]
"""

from collections.abc import Mapping
from typing import Any

import lowbit_kernels as kernels
import torch
from pydantic import BaseModel, StrictBool, StrictInt, StrictStr
from torch import Tensor

from ..files.jsonfile import as_shape
from ..files.tensorfile import TensorEntry
from .base import Codes, PackedLayer, Reader, expect, integer_grid, stored_scale_dtype

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class _Config(BaseModel):
    """The keys that are read, under the names of transformers and of AutoAWQ, and of which kind they are."""

    bits: StrictInt | None = None
    w_bit: StrictInt | None = None
    group_size: StrictInt = 128
    q_group_size: StrictInt = 128
    version: StrictStr = "gemm"
    backend: StrictStr = "autoawq"
    zero_point: StrictBool = True


class AWQ(Reader):
    method = "awq"
    parts = ("qweight", "qzeros", "scales")
    scale = "scales"

    def check(self, config: Mapping[str, Any]) -> None:
        as_shape(config, _Config, "quantization_config")
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm" or config.get("backend", "autoawq") != "autoawq":
            raise ValueError(
                f"version: got {config.get('version')!r} (backend {config.get('backend', 'autoawq')!r}); "
                "allowed: gemm of autoawq"
            )
        if config.get("bits", config.get("w_bit")) != 4:
            raise ValueError(
                f"bits: got {config.get('bits', config.get('w_bit'))!r}; allowed: 4, the only one AWQ's "
                "GEMM layout has"
            )
        if config.get("zero_point", True) is not True:
            raise ValueError(f"zero_point: got {config['zero_point']!r}; allowed: true")
        self._grid(config, "float16")

    def _grid(self, config: Mapping[str, Any], scale_dtype: str) -> Any:
        size = config.get("group_size", config.get("q_group_size", 128))
        what = "quantization_config of this AWQ checkpoint"
        return integer_grid(what, bits=4, group_size=size, symmetric=False, scale_dtype=scale_dtype)

    def layer(self, config: Mapping[str, Any], name: str, parts: Mapping[str, TensorEntry]) -> PackedLayer:
        for local in ("qweight", "scales"):
            if local not in parts or len(parts[local].shape) != 2:
                raise ValueError(f"{name}: no 2-D tensor {name}.{local} in the files")
        grid = self._grid(config, stored_scale_dtype(name, parts["scales"]))
        k, n = parts["qweight"].shape[0], parts["qweight"].shape[1] * 8
        groups = kernels.group_count(k, grid.group_size)
        expect(name, parts, "qweight", (k, n // 8), torch.int32)
        expect(name, parts, "qzeros", (groups, n // 8), torch.int32)
        expect(name, parts, "scales", (groups, n), parts["scales"].dtype)
        return PackedLayer(name, (n, k), grid, parts)

    def unpack(self, config: Mapping[str, Any], layer: PackedLayer, tensors: Mapping[str, Tensor]) -> Codes:
        codes = nibbles(tensors["qweight"]).t().contiguous()
        return Codes(codes, tensors["scales"], nibbles(tensors["qzeros"]))

    def describe(self, config: Mapping[str, Any]) -> str:
        return "AWQ GEMM"


def nibbles(words: Tensor) -> Tensor:
    """int32 [R, C / 8] -> uint8 [R, C], columns in their own order."""
    out = torch.empty(*words.shape, 8, dtype=torch.uint8)
    for i, column in enumerate(ORDER):
        out[:, :, column] = (words >> (4 * i)) & 15
    return out.view(words.shape[0], -1)
