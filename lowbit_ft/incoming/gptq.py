"""GPTQ files: AutoGPTQ's and GPTQModel's layout, 2, 3, 4 and 8 bit.

    qweight  int32 [K b / 32, N]   codes as one bit stream along K, lowest bit first
    qzeros   int32 [G, N b / 32]   zero points along N; v1 ("gptq") stores zero - 1, v2 ("gptq_v2") stores
             zero
    scales   fp16  [G, N]
    g_idx    int32 [K]             the group of every input; only k // g is taken (desc_act sorts them)

A v1 field that is all ones is a zero point of 2^b for some readers, 0 for others, and a carry into the next
field for a third: such a file is refused. Settings: bits, group_size, sym, checkpoint_format, dynamic
(GPTQModel's rules per layer).
"""

from collections.abc import Mapping
from typing import Any

import lowbit_kernels as kernels
import torch
from pydantic import BaseModel, StrictBool, StrictInt, StrictStr
from torch import Tensor

from ..files.jsonfile import as_shape
from ..files.tensorfile import TensorEntry
from ..grid.bitstream import unpack_stream
from ..grid.integer import require
from .base import Codes, PackedLayer, Reader, expect, integer_grid, refuse_order, stored_scale_dtype

FORMATS = ("gptq", "gptq_v2")
BITS = (2, 3, 4, 8)  # that AutoGPTQ and GPTQModel write


class _Config(BaseModel):
    """The keys that are read, and of which kind they are."""

    bits: StrictInt
    group_size: StrictInt = 128
    sym: StrictBool = True
    desc_act: StrictBool | None = None
    checkpoint_format: StrictStr | None = None
    is_marlin_format: StrictBool | None = None
    pack_dtype: StrictStr = "int32"
    dynamic: dict[str, Any] | None = None


class GPTQ(Reader):
    method = "gptq"
    parts = ("qweight", "qzeros", "scales", "g_idx")
    scale = "scales"
    order = "g_idx"

    def check(self, config: Mapping[str, Any]) -> None:
        as_shape(config, _Config, "quantization_config")
        form = config.get("checkpoint_format") or "gptq"
        if form not in FORMATS or config.get("is_marlin_format"):
            raise ValueError(
                f"checkpoint_format: got {'marlin' if config.get('is_marlin_format') else form!r}; "
                f"allowed: {', '.join(FORMATS)}"
            )
        if config.get("pack_dtype", "int32") != "int32":
            raise ValueError(f"pack_dtype: got {config['pack_dtype']!r}; allowed: int32")
        rules = config.get("dynamic")
        if isinstance(rules, dict) and (other := [rule for rule in rules if not str(rule).startswith("-:")]):
            raise ValueError(
                f"dynamic: got the rule {other[0]!r}, other bits for some layers; allowed: rules that "
                "start with '-:' (layers left alone)"
            )
        self._grid(config, "float16")

    def _grid(self, config: Mapping[str, Any], scale_dtype: str) -> Any:
        what, bits = "quantization_config of this GPTQ checkpoint", config.get("bits")
        require(f"{what}: bits", bits, BITS)  # the grid has one more
        return integer_grid(
            what,
            bits=bits,
            group_size=config.get("group_size", 128),
            symmetric=config.get("sym", True),
            scale_dtype=scale_dtype,
        )

    def layer(self, config: Mapping[str, Any], name: str, parts: Mapping[str, TensorEntry]) -> PackedLayer:
        for local in ("qweight", "scales"):
            if local not in parts or len(parts[local].shape) != 2:
                raise ValueError(f"{name}: no 2-D tensor {name}.{local} in the files")
        grid = self._grid(config, stored_scale_dtype(name, parts["scales"]))
        n, k = parts["qweight"].shape[1], parts["qweight"].shape[0] * 32 // grid.bits
        groups = kernels.group_count(k, grid.group_size)
        expect(name, parts, "qweight", (k * grid.bits // 32, n), torch.int32)
        expect(name, parts, "qzeros", (groups, -(-n * grid.bits // 32)), torch.int32)
        expect(name, parts, "scales", (groups, n), parts["scales"].dtype)
        if "g_idx" in parts:
            expect(name, parts, "g_idx", (k,), torch.int32)
        elif config.get("desc_act"):
            raise ValueError(f"{name}: desc_act is true, but there is no {name}.g_idx; the file is damaged")
        return PackedLayer(name, (n, k), grid, parts)

    def unpack(self, config: Mapping[str, Any], layer: PackedLayer, tensors: Mapping[str, Tensor]) -> Codes:

        (n, k), bits = layer.shape, layer.grid.bits
        if "g_idx" in tensors:
            refuse_order(tensors["g_idx"], layer.grid.group_size)
        codes = unpack_stream(tensors["qweight"].t().contiguous(), bits, k)
        zero = unpack_stream(tensors["qzeros"], bits, n).to(torch.int16)
        if (config.get("checkpoint_format") or "gptq") == "gptq":
            full = int((zero == layer.grid.levels - 1).sum())
            if full:
                raise ValueError(
                    f"{full} zero points are stored as {layer.grid.levels - 1}, which the readers of GPTQ "
                    "v1 do not agree on "
                    f"(0, {layer.grid.levels}, or a carry); save it again as checkpoint_format: gptq_v2"
                )
            zero = zero + 1
        return Codes(codes, tensors["scales"], zero)

    def may_sort(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("desc_act"))

    def describe(self, config: Mapping[str, Any]) -> str:
        return f"GPTQ {'v2' if config.get('checkpoint_format') == 'gptq_v2' else 'v1'}"
