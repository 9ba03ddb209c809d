"""What the AOT gate compiles of the kernels for sign planes, as their launchers would start them."""

import torch
import triton.language as tl

from . import dispatch
from .binary_dequantize_triton import dequantize_kernel
from .binary_forward_triton import decode_kernel, fused_kernel
from .binary_gradients_triton import gradients_kernel, group_sums_kernel
from .layout import superblock
from .triton_common import (
    launch_options,
)

_SIZES = dict.fromkeys(("M", "N", "K", "stride_x", "stride_w", "groups"), "i32")
_VALUES = {"planes": "*i16", "alpha": "*bf16", "offset": "*bf16"}
_GATED = (80, 86, 89, 90, 120)


def _matmul_case(dtype: str, q: int, group: int, m: int, arch: int) -> tuple:
    """decode_kernel or fused_kernel, whichever the table has for this M."""
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float16
    config = dispatch.packaged("binary_matmul", q, torch_dtype, m, 4096, 4096, arch)
    regime, rows, columns = config["regime"], config["BLOCK_M"], config["BLOCK_N"]
    signature = {"x": "*" + dtype, **_VALUES, "y": "*" + dtype, **_SIZES}
    constants = {
        "Q": q,
        "GROUP": group,
        "OFFSET": regime == "fused",
        "EVEN_K": True,
        "CT": tl.bfloat16 if dtype == "bf16" else tl.float16,
        "ASM": True,
        "BLOCK_M": rows,
        "BLOCK_N": columns,
    }
    if regime == "decode":
        signature |= {"xsum": "*fp32", "work": "*fp32", "arrived": "*i32", "per_part": "i32"}
        constants["PARTS"] = 4
    name = f"binary-{regime}-q{q}-g{group}-m{rows}-n{columns}-{dtype}"
    kernel = decode_kernel if regime == "decode" else fused_kernel
    return name, kernel, signature, constants, launch_options(config), columns * superblock(1), (arch,)


def _gradient_case(q: int, arch: int) -> tuple:
    config = dispatch.packaged("binary_gradients", q, torch.bfloat16, 4096, 4096, 4096, arch)
    signature = {
        "x": "*bf16",
        "dy": "*bf16",
        "planes": "*i16",
        "da": "*fp32",
        "dt": "*fp32",
        **_SIZES,
        "stride_y": "i32",
    }
    tile = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    constants = {"Q": q, "GROUP": 128, "CT": tl.bfloat16, **tile}
    name = f"binary-gradients-q{q}-m{tile['BLOCK_M']}-bf16"
    return name, gradients_kernel, signature, constants, launch_options(config), None, (arch,)


def _chunk_cases() -> list[tuple]:
    config = dispatch.packaged("binary_dequantize", 1, torch.bfloat16, 4096, 4096, 4096, 80)
    rows = {"first_row": "i32", "stop_row": "i32", "N": "i32", "K": "i32", "stride_w": "i32", "groups": "i32"}
    written = {**_VALUES, "out": "*bf16", "first_block": "i32", "stride_out": "i32", **rows}
    summed = {
        "dw": "*bf16",
        "planes": "*i16",
        "da": "*fp32",
        "dt": "*fp32",
        "stride_dw": "i32",
        "per_group": "i32",
        **rows,
    }
    tile, options = {"Q": 3, "BLOCK_N": config["BLOCK_N"]}, launch_options(config)
    return [
        (
            "binary-dequantize-q3-bf16",
            dequantize_kernel,
            written,
            {**tile, "GROUP": 128, "OFFSET": True},
            options,
            None,
        ),
        ("binary-group-sums-q3-bf16", group_sums_kernel, summed, tile, options, None),
    ]


def aot_cases() -> list[tuple]:
    """What the AOT gate compiles: the table's entries for each number of planes, once per architecture."""
    cases = [
        _matmul_case("bf16", q, 128, m, arch) for arch in _GATED for q in (1, 2, 3, 4) for m in (1, 16, 64)
    ]
    cases += [_matmul_case("bf16", 3, 0, 1, arch) for arch in _GATED] + [
        _matmul_case("fp16", 3, 128, 1, arch) for arch in _GATED
    ]
    cases += [
        _gradient_case(3, arch) for arch in _GATED if arch != 90
    ]  # there the table takes the chunked form
    return cases + _chunk_cases()
