"""gptq and gptq_v2: the checkpoint layout of AutoGPTQ and GPTQModel; transformers (with gptqmodel), ExLlama,
vLLM (4 and 8 bit).

    qweight  int32 [K b / 32, N]   unsigned codes, a bit stream along K for every output, lowest bit first
    qzeros   int32 [G, N b / 32]   zero points, the same stream along N; version 1 stores them less one
    scales   fp16  [G, N]
    g_idx    int32 [K]             the group of every input

Only the layout is GPTQ's: the codes are the trained ones. Version 1 readers add the one back to whole 32-bit
words, so a zero point of 0, stored as all ones, carries into its neighbour: `gptq` holds symmetric grids
only, `gptq_v2` both. Streams fill whole words: K and N must be multiples of 32 / b (of 32 at 3 bit). One grid
for the whole model, and in every block the same layers: that is what the configuration can say. Logits agree
within 1e-2 of the largest: the reader multiplies in an order of its own.
"""

# The reader is an optional package.
# pyright: reportMissingImports=false

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lowbit_kernels as kernels
import torch
from torch import Tensor

from ..grid import BinaryGrid, Grid, IntGrid, PackedWeight, Weight
from ..grid.bitstream import pack_stream, unpack_stream
from ..model.matrices import Matrix
from .base import Exporter, LayerSpec, ReadBack, TensorSpecs, check_tensors, check_values, with_versions
from .gguf import float16_scale

BITS = (2, 3, 4, 8)
OTHERS = "set export.format: compressed-tensors or native"


def reject_float16(name: str, grid: Grid, offset: bool) -> str | None:
    """What all formats with float16 scales and integer zero points cannot hold."""
    if isinstance(grid, BinaryGrid):
        return f"{name} has no sign planes; set export.format: native"
    if offset:
        return (
            f"{name} holds no float offset per group; set export.format: native, or train an integer offset"
        )
    if grid.scale_dtype == "float32":
        return (
            f"{name} has float16 scales, which changes float32 ones; use scale_dtype bfloat16, or set "
            "export.format: native"
        )
    return None


def reject_groups(name: str, grid: Grid, in_features: int) -> str | None:
    """Formats that have whole groups only."""
    if grid.group_size == -1 or in_features % grid.group_size == 0:
        return None
    return (
        f"{name} needs whole groups, and group size {grid.group_size} does not divide {in_features} inputs; "
        "choose a group size that does (or -1), or set export.format: native"
    )


def reject_mixture(name: str, layers: Mapping[str, LayerSpec]) -> list[str]:
    """Formats whose configuration names one grid, and never packs the head."""
    problems = []
    if len(grids := {spec.grid for layer, spec in layers.items() if not layer.endswith("lm_head")}) > 1:
        problems.append(
            f"{name} holds one grid for all layers, and here are {len(grids)}; remove "
            f"quant.overrides, or {OTHERS}"
        )
    problems += [
        f"{n}: {name} readers keep the head dense; quant.lm_head: null (or exclude it), or {OTHERS}"
        for n in layers
        if n.endswith("lm_head")
    ]
    return problems


def block_layers(layers: Mapping[str, LayerSpec]) -> dict[str, set[str]]:
    """{"self_attn.q_proj": {"0", "1", ...}}: the blocks in which each layer of a decoder block is packed."""
    found: dict[str, set[str]] = {}
    for name in layers:
        match = re.fullmatch(r".*?\.(\d+)\.(.+)", name)
        found.setdefault(match[2] if match else name, set()).add(match[1] if match else "")
    return found


class Gptq(Exporter):
    name = "gptq"
    language_only = "its readers build language models alone"
    quant_method = "gptq"
    kv_server = "vllm"
    chat_flag = "--default-chat-template-kwargs"
    fused_by_servers = True
    needs = "gptqmodel optimum"
    checkpoint_names = True
    dense_experts = False
    reads_with = ("gptqmodel", "optimum")
    extra = "gptq"
    extra_note = " (in an environment of its own: it wants a newer torch than constraints.txt has)"
    tolerance = 1e-2
    less_one: ClassVar[bool] = True  # whether zero points are stored less one

    def reject(self, grid: Grid, offset: bool = False) -> str | None:
        if self.less_one and isinstance(grid, IntGrid) and not grid.symmetric:
            return (
                "gptq (version 1) cannot store a zero point of 0; set export.format: gptq_v2, "
                "compressed-tensors or native"
            )
        if isinstance(grid, IntGrid) and grid.bits not in BITS:
            return f"{self.name} holds 2, 3, 4 and 8 bits, not {grid.bits}; set quant.bits, or {OTHERS}"
        return reject_float16(self.name, grid, offset)

    def reject_width(self, grid: Grid, in_features: int) -> str | None:
        whole = 32 if grid.bits == 3 else 32 // grid.bits
        if in_features % whole:
            return (
                f"{self.name} needs a multiple of {whole} inputs at {grid.bits} bit, not {in_features}; "
                f"exclude it, or {OTHERS}"
            )
        return reject_groups(self.name, grid, in_features)

    def reject_model(self, layers: Mapping[str, LayerSpec]) -> list[str]:
        problems = super().reject_model(layers) + reject_mixture(self.name, layers)
        for layer, spec in layers.items():
            whole = 32 if spec.grid.bits == 3 else 32 // spec.grid.bits
            if spec.shape[0] % whole:
                problems.append(
                    f"{layer}: {self.name} needs a multiple of {whole} outputs at {spec.grid.bits} bit, "
                    f"not {spec.shape[0]}; exclude it, or {OTHERS}"
                )
        blocks = block_layers(
            {layer: spec for layer, spec in layers.items() if not layer.endswith("lm_head")}
        )
        every = set().union(*blocks.values())
        problems += [
            f"{layer}: {self.name} needs it packed in all blocks or in none, and block "
            f"{min(every - where)} leaves it dense; "
            f"exclude it everywhere, or {OTHERS}"
            for layer, where in blocks.items()
            if where != every
        ]
        return problems

    def specs(self, layer: LayerSpec) -> TensorSpecs:
        (n, k), b = layer.shape, layer.grid.bits
        groups = kernels.group_count(k, layer.grid.group_size)
        return {
            "qweight": ((k * b // 32, n), torch.int32),
            "qzeros": ((groups, n * b // 32), torch.int32),
            "scales": ((groups, n), torch.float16),
            "g_idx": ((k,), torch.int32),
        }

    def pack(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, PackedWeight) and weight.residual is None and weight.offset is None
        grid, k = weight.grid, weight.shape[1]
        zero = (
            torch.full_like(weight.scale, grid.levels // 2, dtype=torch.uint8)
            if weight.zero is None
            else weight.zero
        )
        return {
            "qweight": pack_stream(weight.unpack_codes(), grid.bits).t().contiguous(),
            "qzeros": pack_stream(zero - 1 if self.less_one else zero, grid.bits),
            "scales": float16_scale(weight).t().contiguous(),
            "g_idx": _group_index(grid, k),
        }

    def unpack(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> Weight:
        assert isinstance(layer.grid, IntGrid)
        check_tensors(tensors, self.specs(layer), str(layer))
        (n, k), grid = layer.shape, layer.grid
        if not torch.equal(tensors["g_idx"], _group_index(grid, k)):
            raise ValueError(f"{layer}: g_idx has groups in another order; not a file of ours")
        zero = unpack_stream(tensors["qzeros"], grid.bits, n) + int(self.less_one)
        codes = unpack_stream(tensors["qweight"].t().contiguous(), grid.bits, k)
        return from_parts(layer, codes, tensors["scales"], zero)

    def model_config(self, layers: Mapping[str, LayerSpec], skipped: Sequence[str]) -> dict[str, Any]:
        grid = next(iter(layers.values())).grid
        assert isinstance(grid, IntGrid)
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "bits": grid.bits,
            "group_size": grid.group_size,
            "sym": grid.symmetric,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
        }
        dense = [name for name in skipped if not name.startswith("re:") and not name.endswith("lm_head")]
        if dense:  # transformers takes the names inside a block, GPTQModel and vLLM rules by name
            config["modules_in_block_to_quantize"] = [sorted(block_layers(layers))]
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in dense}
        return config

    def read_back(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> ReadBack:
        """Codes and zero points as gptqmodel's own layer decodes them, from its products with scales of 1."""
        from gptqmodel.nn_modules.qlinear import PackableQuantLinear
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

        (n, k), grid = layer.shape, layer.grid
        assert isinstance(grid, IntGrid)
        module = TorchLinear(
            bits=grid.bits,
            group_size=grid.group_size,
            sym=grid.symmetric,
            desc_act=False,
            in_features=k,
            out_features=n,
            bias=False,
        )
        module.qweight.data, module.qzeros.data = tensors["qweight"].clone(), tensors["qzeros"].clone()
        module.g_idx.data, module.scales.data = tensors["g_idx"], torch.ones_like(tensors["scales"])
        if self.less_one:
            convert_gptq_v1_to_v2_format_module(module, bits=grid.bits, pack_dtype=torch.int32)
        signed = PackableQuantLinear.dequantize_weight(module).float()  # [K, N], code - zero
        module.qweight.data = torch.zeros_like(module.qweight)
        zero = -PackableQuantLinear.dequantize_weight(module).float()
        groups = tensors["g_idx"].long()
        per_group = torch.empty(len(tensors["scales"]), n).index_copy_(0, groups, zero)
        codes = (signed + zero).t().to(torch.uint8)
        return ReadBack(codes, tensors["scales"], None if grid.symmetric else per_group.to(torch.uint8))

    def dense(self, model: Any, layer: str, matrix: Matrix | None, dtype: torch.dtype) -> Tensor | None:
        return None  # its layers multiply from the packed codes

    def reader(self) -> str:
        return with_versions("transformers", "gptqmodel")

    def serve(self, folder: str) -> str:
        return f"vllm serve {folder}"


class GptqV2(Gptq):
    name = "gptq_v2"
    less_one = False


def from_parts(layer: LayerSpec, codes: Tensor, scales: Tensor, zero: Tensor) -> PackedWeight:
    """codes uint8 [N, K], float16 scales [G, N], zero uint8 [G, N], as read from a file -> the weight.
    ValueError for values that no writer of ours makes."""
    grid = layer.grid
    assert isinstance(grid, IntGrid)
    scale = scales.to(getattr(torch, grid.scale_dtype))
    if not torch.equal(scale.half(), scales):
        raise ValueError(f"{layer}: scales has values that are not {grid.scale_dtype}; not a file of ours")
    if grid.symmetric and not bool((zero == grid.levels // 2).all()):
        raise ValueError(f"{layer}: has zero points other than {grid.levels // 2}; not a file of ours")
    weight = PackedWeight(
        codes=kernels.pack(codes, grid.bits),
        scale=scale,
        zero=None if grid.symmetric else zero,
        shape=layer.shape,
        grid=grid,
    )
    check_values(weight)
    return weight


def _group_index(grid: Grid, in_features: int) -> Tensor:
    size = in_features if grid.group_size == -1 else grid.group_size
    return torch.arange(in_features, dtype=torch.int32) // size
