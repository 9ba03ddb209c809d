"""What the AOT gate compiles of gradients_triton.py: the kernels as their launchers would start them."""

import torch
import triton.language as tl

from . import dispatch
from .gradients_chunked_triton import chunked_kernel
from .gradients_epilogue_triton import projection_block
from .gradients_fused_triton import fused_kernel
from .grid_triton import FP_OPTIONS, rank_block
from .scratch import CHUNKED, PROJECTION_BLOCK, gradient_form
from .triton_common import launch_options


def _case(
    form: str,
    rank: int,
    units: str,
    config: dict,
    exact: bool = False,
    only: tuple[int, ...] = (),
    masked: bool = False,
    lowest: int = 0,
) -> tuple:
    live = units == "live"
    dtype = torch.float32 if exact else torch.bfloat16
    rows = gradient_form(config | {"form": form}, rank, dtype, False, masked)["BLOCK_N"]
    fraction = 4 if rank or live else 0
    pointers = {"codes": "*i16", "scale0": "*bf16", "scale": "*fp32"} | dict.fromkeys(
        ("sum_s", "sum_t", "part_a", "part_b"), "*fp32"
    )
    if fraction:
        pointers["residual"] = "*i16"
    if rank:
        pointers |= {"a": "*fp32", "b": "*fp32"}
    if masked:
        pointers["mask"] = "*i16"
    sizes = dict.fromkeys(("N", "K", "codes_row", "residual_row", "mask_row"), "i32")
    optional = ("residual", "zero0", "a", "b", "zero", "offset", "mask")
    absent = {name: None for name in optional if name not in pointers}
    constants = absent | {
        "UNITS_LIVE": live,
        "UNITS_WEIGHT": units == "weight",
        "CLIP_FIRST": live,
        "BITS": 4,
        "LOWEST": lowest,
        "RESIDUAL_BITS": fraction,
        "GROUP": 128,
        "R": rank,
        "BLOCK_R": rank_block(rank),
        "BLOCK_P": projection_block(rank),
        "BLOCK_N": rows,
        "EXACT": exact,
    }
    if form == "fused":
        pointers |= {"x": "*bf16", "dy": "*bf16"}
        sizes |= dict.fromkeys(("M", "x_row", "dy_row"), "i32")
        constants |= {"BLOCK_K": 128, "BLOCK_M": 64, "GROUP_N": 8, "CT": tl.bfloat16, "PRODUCT": "tf32"}
    else:
        pointers["dw"] = "*fp32" if exact else "*bf16"
        sizes |= dict.fromkeys(("start", "rows"), "i32")
        constants["SPAN"] = config.get("SPAN", 32 if rank <= 2 * PROJECTION_BLOCK else 1)
        constants["PROJECT"] = form == "chunked"
    options = {**launch_options(config), **FP_OPTIONS}
    kernel = fused_kernel if form == "fused" else chunked_kernel
    # The hot loop of the fused form is over M: its instructions are per element of dW and step, not per
    # weight.
    weights = None if form == "fused" else rows * 32
    case = (
        f"gradients-{form}-r{rank}-{units}{'-mask' * masked}{'-above' * lowest}{'-fp32' * exact}",
        kernel,
        pointers | sizes | {"gain": "fp32"},
        constants,
        options,
        weights,
    )
    return (*case, only) if only else case


def aot_cases() -> list[tuple]:
    """What the AOT gate compiles: the forms as the table has them, and the others at the tiles a tuner
    starts from.
    """
    table, hopper = (
        dispatch.packaged("grid_gradients", 4, torch.bfloat16, 4096, 4096, 4096, arch) for arch in (80, 90)
    )
    assert table["form"] == "chunked" and hopper["form"] == "fused"
    wide = {"BLOCK_N": 128, "num_warps": 8, "num_stages": 3}
    blas = {"BLOCK_N": 64, "SPAN": 4, "num_warps": 4, "num_stages": 1, "maxnreg": 255}
    return [
        *(_case("chunked", rank, "grid", table) for rank in (0, 16, 64, 128)),
        *(_case("chunked", rank, "live", table) for rank in (0, 64)),
        _case("chunked", 32, "weight", table),
        _case("chunked", 64, "grid", table, exact=True),
        *(
            _case("fused", rank, units, hopper, only=(90,))
            for rank in (0, 16, 64)
            for units in ("grid", "live")
        ),
        *(
            _case("chunked", *what, table, masked=True)
            for what in ((64, "grid"), (64, "live"), (32, "weight"))
        ),
        *(_case("fused", 64, units, hopper, only=(90,), masked=True) for units in ("grid", "live")),
        *(_case("chunked", 64, units, table, lowest=1) for units in ("grid", "live")),
        _case("fused", 64, "live", hopper, only=(90,), lowest=1),
        # what takes the place of the fused form: of fp32 inputs, and of a rank too large to be summed on chip
        _case("chunked", 128, "weight", CHUNKED, only=(90,)),
        _case("chunked", 16, "grid", CHUNKED, exact=True, only=(90,)),
        *(_case("blas", rank, "grid", blas, only=(80, 90)) for rank in (16, 64, 128)),
        _case("blas", 64, "grid", blas, exact=True, only=(80, 90)),
        _case("fused", 0, "grid", wide, only=(80,)),
        # on sm_8x rank 64 fits only with half the rows
        _case("fused", 64, "live", {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}, only=(80,)),
    ]
