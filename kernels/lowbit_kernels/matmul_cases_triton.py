"""What the AOT gate compiles of matmul_triton.py: the kernels as their launchers would start them."""

import itertools

import torch
import triton.language as tl

from . import dispatch
from .layout import LANES
from .matmul_dequantize_triton import dequantize_kernel
from .matmul_dx_triton import dx_kernel, dx_tile
from .matmul_forward_triton import forward_kernel, forward_tile
from .matmul_weight_triton import FLOAT, INTEGER, SYMMETRIC, options_of
from .triton_common import fields


def _case(
    kind: str,
    bits: int,
    dtype: str,
    scale: str,
    zero: str,
    group: int,
    config: dict,
    tile: dict,
    only: tuple = (),
) -> tuple:
    """One entry of aot_cases: a kernel as its launcher would start it, with K and N that fill their blocks
    except for 3 bits.
    """
    planes, compute = fields(bits), {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype]
    constants = {
        "BITS": bits,
        "PLANES": planes,
        "GROUP": group,
        "ZERO": {"": SYMMETRIC, "uint8": INTEGER, "float": FLOAT}[zero],
        "OFFSET": zero == "float",
        "CT": compute,
        "ASM": dtype != "fp32",
        **tile,
    }
    values = {
        "codes": "*i16",
        "scale": f"*{scale}",
        "zero": "*u8" if zero == "uint8" else "*fp32",
        "offset": "*fp32",
    }
    split = {"work": "*fp32", "arrived": "*i32", "M": "i32", "N": "i32", "K": "i32"}
    rest = {"stride_w": "i32", "groups": "i32", "per_part": "i32"}
    weights = tile["BLOCK_N"] * LANES
    if kind in ("decode", "fused"):
        function, weights = forward_kernel, weights * planes * tile["UNROLL"]
        signature = {
            "x": f"*{dtype}",
            **values,
            "xsum": "*fp32",
            "y": f"*{dtype}",
            **split,
            "stride_x": "i32",
            **rest,
        }
        constants |= {"EVEN_K": bits != 3, "PARTS": 4 if kind == "decode" else 1}
    elif kind == "dx":
        function, weights = dx_kernel, weights * tile["COUNT"]
        signature = {"dy": f"*{dtype}", **values, "dx": f"*{dtype}", **split, "stride_y": "i32", **rest}
        constants |= {"EVEN_N": True, "PARTS": 4 if config["regime"] == "decode" else 1}
    else:
        function, weights = dequantize_kernel, None
        sizes = ("N", "K", "stride_w", "stride_o", "blocks", "first_block", "groups")
        signature = {**values, "out": f"*{dtype}", **dict.fromkeys(sizes, "i32")}
        constants |= {"SCALE_ROWS": 4096}
    options = options_of(config, kind == "decode")
    name = f"{kind} {bits}-bit {dtype} scale {scale}{' zero ' + zero if zero else ''} g{group}"
    name += "".join(
        f" {key}{int(tile[key])}" for key in ("BLOCK_M", "BLOCK_N", "UNROLL", "JOIN") if key in tile
    )
    name += f" w{options['num_warps']} s{options['num_stages']}".replace("BLOCK_", "")
    return (
        name.replace("BLOCK_", ""),
        function,
        signature,
        constants,
        options,
        weights,
        *([only] if only else []),
    )


_GATED = (80, 86, 89, 90, 120)


def _table_kernels() -> dict[tuple, list[int]]:
    """(kind, bits, entry, tile) -> architectures, for every entry of the packaged table that bf16 layers
    can be given.
    """
    found: dict[tuple, list[int]] = {}
    for op, bits, m, arch in itertools.product(
        ("packed_matmul", "packed_matmul_dx"), (2, 3, 4, 6, 8), (1, 16, 32, 64, 128, 512), _GATED
    ):
        config = dispatch.packaged(op, bits, torch.bfloat16, m, 4096, 4096, arch)
        if config["regime"] != "two_stage":
            tile = forward_tile(config, m) if op == "packed_matmul" else dx_tile(config, bits, arch)
            kind = "dx" if op == "packed_matmul_dx" else config["regime"]
            case = (kind, bits, tuple(config.items()), tuple(tile.items()))
            if arch not in found.setdefault(case, []):
                found[case].append(arch)
    return found


def aot_cases() -> list[tuple]:
    """What the AOT gate compiles: the table's, and the other dtypes, zeros and groups that make another
    kernel of an entry.
    """
    cases = [
        _case(kind, bits, "bf16", "bf16", "", 128, dict(config), dict(tile), tuple(archs))
        for (kind, bits, config, tile), archs in _table_kernels().items()
    ]
    for m, dtype, scale, zero, group in (
        (1, "bf16", "bf16", "uint8", 128),
        (1, "bf16", "fp32", "float", 128),
        (1, "fp16", "bf16", "", 128),
        (128, "bf16", "fp32", "float", 128),
        (64, "fp16", "bf16", "uint8", 64),
        (64, "bf16", "bf16", "", 0),
    ):
        config = dispatch.packaged("packed_matmul", 4, torch.bfloat16, m, 4096, 4096, 80)
        cases.append(_case(config["regime"], 4, dtype, scale, zero, group, config, forward_tile(config, m)))
    # Group values of 4 bytes for every plane take the most shared memory: what a training layer of small
    # groups asks for.
    for (kind, bits, config, tile), archs in _table_kernels().items():
        if kind == "fused":
            cases.append(
                _case(kind, bits, "bf16", "fp32", "float", 32, dict(config), dict(tile), tuple(archs))
            )
    config = dispatch.packaged("packed_matmul_dx", 4, torch.bfloat16, 16, 4096, 4096, 80)
    cases.append(_case("dx", 4, "bf16", "fp32", "float", 128, config, dx_tile(config, 4, 80)))
    for bits, dtype, scale, zero in (
        (4, "bf16", "bf16", ""),
        (6, "bf16", "bf16", ""),
        (3, "fp32", "fp32", "float"),
    ):
        config = dispatch.packaged("dequantize", bits, torch.bfloat16, 4096, 4096, 4096, 80)
        cases.append(
            _case("dequantize", bits, dtype, scale, zero, 128, config, {"BLOCK_N": config["BLOCK_N"]})
        )
    return cases
