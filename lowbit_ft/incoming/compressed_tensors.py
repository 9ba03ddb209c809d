"""compressed-tensors files in the format `pack-quantized` (llm-compressor, and our own exports), weights
only.

    weight_packed      int32 [N, ceil(K b / 32)]   a bit stream along K
    weight_scale       [N, G]                      fp16, bf16 or fp32
    weight_zero_point  int32 [ceil(N b / 32), G]   a bit stream along N; int8 [N, G], counted from the middle,
                       in older files
    weight_shape       int [2]                     (N, K)
    weight_g_idx       int32 [K]                   act-order; only k // g is taken

Several config_groups (mixed bits) are read; which group a layer belongs to is what its `targets` say: a
layer's name or "re:..." before a class name.
"""

from collections.abc import Mapping
from typing import Any

import lowbit_kernels as kernels
import regex
import torch
from pydantic import BaseModel, StrictBool, StrictInt, StrictStr
from torch import Tensor

from ..files.jsonfile import as_shape
from ..files.tensorfile import TensorEntry, read_tensor
from ..grid.bitstream import unpack_stream
from ..names import regex_matches
from .base import Codes, PackedLayer, Reader, expect, integer_grid, refuse_order, stored_scale_dtype

FORMAT = "pack-quantized"


class _Weights(BaseModel):
    num_bits: StrictInt
    group_size: StrictInt | None = None
    symmetric: StrictBool = True
    dynamic: Any = False
    type: StrictStr | None = None
    strategy: StrictStr | None = None
    actorder: StrictStr | StrictBool | None = None


class _Group(BaseModel):
    weights: _Weights
    targets: list[StrictStr] | None = None
    format: StrictStr | None = None


class _Sparsity(BaseModel):
    format: StrictStr = "dense"


class _Config(BaseModel):
    """The keys that are read, and of which kind they are."""

    config_groups: dict[str, _Group]
    format: StrictStr | None = None
    sparsity_config: _Sparsity | None = None


class CompressedTensorsReader(Reader):
    method = "compressed-tensors"
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    scale = "weight_scale"
    order = "weight_g_idx"

    def check(self, config: Mapping[str, Any]) -> None:
        as_shape(config, _Config, "quantization_config")
        groups = config["config_groups"]
        for name, group in groups.items():
            form = group.get("format") or config.get("format")
            if form != FORMAT:
                raise ValueError(f"config_groups.{name}: format: got {form!r}; allowed: {FORMAT}")
            for key in ("input_activations", "output_activations"):
                if group.get(key):
                    raise ValueError(
                        f"config_groups.{name}.{key}: got a scheme; allowed: null, only weights are "
                        "quantized here"
                    )
            weights = group["weights"]
            wanted = {"type": ("int",), "strategy": ("group", "channel"), "dynamic": (False, None)}
            for key, allowed in wanted.items():
                if weights.get(key) not in allowed:
                    raise ValueError(
                        f"config_groups.{name}.weights.{key}: got {weights.get(key)!r}; allowed: "
                        f"{', '.join(map(str, allowed))}"
                    )
            self._grid(name, weights, "bfloat16")
        for key in ("kv_cache_scheme", "transform_config"):
            if config.get(key):
                raise ValueError(f"{key}: got a scheme; allowed: null")
        sparsity = config.get("sparsity_config")
        if sparsity and sparsity.get("format", "dense") != "dense":
            raise ValueError(f"sparsity_config.format: got {sparsity['format']!r}; allowed: dense")

    def _grid(self, group: str, weights: Mapping[str, Any], scale_dtype: str) -> Any:
        size = weights.get("group_size") if weights.get("strategy") == "group" else -1
        return integer_grid(
            f"config_groups.{group}.weights",
            bits=weights.get("num_bits"),
            group_size=size,
            symmetric=weights.get("symmetric", True),
            scale_dtype=scale_dtype,
        )

    def layer(self, config: Mapping[str, Any], name: str, parts: Mapping[str, TensorEntry]) -> PackedLayer:
        for local in ("weight_packed", "weight_scale", "weight_shape"):
            if local not in parts:
                raise ValueError(f"{name}: no tensor {name}.{local} in the files")
        group = group_of(config["config_groups"], name)
        weights = config["config_groups"][group]["weights"]
        if weights.get("actorder") in ("group", True) and "weight_g_idx" not in parts:
            raise ValueError(
                f"{name}: config_groups.{group} says actorder {weights['actorder']!r}, so its groups are "
                "not in the order of the inputs, "
                "but the files have no weight_g_idx; quantize again with actorder null or weight"
            )
        grid = self._grid(group, weights, stored_scale_dtype(name, parts["weight_scale"]))
        stored = parts["weight_shape"]
        if stored.shape != (2,) or stored.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{name}: weight_shape is {str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}; "
                "needs two integers, [out, in]"
            )
        shape = read_tensor(stored).tolist()
        if min(shape) < 1:
            raise ValueError(f"{name}: weight_shape is {shape}; needs [out, in]")
        n, k = shape
        groups = kernels.group_count(k, grid.group_size)
        # Another width than the bit stream's: 3-bit files of compressed-tensors before 0.9 put ten codes into
        # a word.
        expect(name, parts, "weight_packed", (n, -(-k * grid.bits // 32)), torch.int32)
        expect(name, parts, "weight_scale", (n, groups), parts["weight_scale"].dtype)
        zero = parts.get("weight_zero_point")
        if not grid.symmetric:
            old = zero is not None and zero.dtype == torch.int8
            expect(
                name,
                parts,
                "weight_zero_point",
                (n, groups) if old else (-(-n * grid.bits // 32), groups),
                torch.int8 if old else torch.int32,
            )
        elif zero is not None:
            raise ValueError(
                f"{name}: has zero points, but config_groups.{group} says symmetric; the file is damaged"
            )
        return PackedLayer(name, (n, k), grid, parts)

    def unpack(self, config: Mapping[str, Any], layer: PackedLayer, tensors: Mapping[str, Tensor]) -> Codes:

        (n, k), bits = layer.shape, layer.grid.bits
        if "weight_g_idx" in tensors:
            refuse_order(tensors["weight_g_idx"], layer.grid.group_size)
        codes = unpack_stream(tensors["weight_packed"], bits, k)
        zero = tensors.get("weight_zero_point")
        if zero is not None and zero.dtype == torch.int8:
            zero = (zero.to(torch.int16) + (1 << (bits - 1))).t()
        elif zero is not None:
            zero = unpack_stream(zero.t().contiguous(), bits, n).to(torch.int16)
        return Codes(codes, tensors["weight_scale"].t(), zero)


def group_of(groups: Mapping[str, Any], layer: str) -> str:
    """The config group of a layer: by name or pattern first, then by class. ValueError when none has it."""
    by_class = None
    for name, group in groups.items():
        for target in group.get("targets") or ():
            if target == layer or (target.startswith("re:") and _matches(target[3:], layer)):
                return name
            if by_class is None and target == "Linear":
                by_class = name
    if by_class is None:
        raise ValueError(
            f"{layer}: is packed, but no group of config_groups has it among its targets; "
            "the folder is damaged"
        )
    return by_class


def _matches(pattern: str, layer: str) -> bool:
    try:
        return regex_matches(pattern, layer)
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"config_groups: the target 're:{pattern}' is no regular expression ({error})"
        ) from None
