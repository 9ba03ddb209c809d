"""The Hadamard transform as two tensor-core products per tile, one read and one write of x.

With D = d1 * d2 the D channels of one run form a d1 x d2 matrix X (d2 a power of two), and H_D = H_d1 (x)
H_d2 acts as H_d1 X H_d2. Several runs lie behind each other in memory, so a tile is simply ROWS consecutive
rows of d2 numbers, ROWS a multiple of d1, and the left matrix is the block diagonal of H_d1's. +-1 is exact
in 16 bits, and so is x; the intermediate sum is not, therefore it is cut into PARTS bf16 numbers (8 bits
each) whose products are added in fp32.

    D            d2     d1           left matrix
    <= 64        D      1            none
    4096         64     64           H_64 (x) 1
    14336        64     28 * 8       H_28 (x) H_8, rows padded from 224 to 256
"""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .counters import persistent
from .hadamard import factors, matrix, resolved
from .launch import cdiv, launch
from .triton_common import COMPUTE, INTERPRETED, launch_options


@triton.jit
def _split(value, PARTS: tl.constexpr, PT: tl.constexpr, part: tl.constexpr):
    """Piece `part` of fp32 numbers cut into PARTS numbers of type PT, largest first."""
    for _ in tl.static_range(part):
        value = value - value.to(PT).to(tl.float32)
    if PARTS == 1 and PT == tl.float32:
        return value
    else:
        return value.to(PT)


@triton.jit
def hadamard_kernel(
    x,
    y,
    left,
    right,
    rows,
    factor,
    D2: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    LEFT: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    IT: tl.constexpr,
    PT: tl.constexpr,
):
    """x, y [rows, D2]; left [ROWS, ROWS] and right [WIDTH, WIDTH] of +-1, zero outside. One program: TILE
    rows of x. WIDTH and ROWS are D2 and TILE padded to what tl.dot takes; IT the type of x's pieces, PT of
    the intermediate's."""
    start = tl.program_id(0).to(tl.int64) * TILE
    column = tl.arange(0, WIDTH)
    h = tl.load(right + column[:, None] * WIDTH + column[None, :])
    out_row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, ROWS, STEP):
        row = first + tl.arange(0, STEP)
        inside = ((row < TILE) & (start + row < rows))[:, None] & (column < D2)[None, :]
        value = tl.load(x + (start + row)[:, None] * D2 + column[None, :], mask=inside, other=0.0)
        part = tl.zeros((STEP, WIDTH), tl.float32)
        for i in tl.static_range(IN_PARTS):
            piece = value if IN_PARTS == 1 else _split(value, IN_PARTS, IT, i)
            part = tl.dot(piece.to(IT), h, part)
        if LEFT:
            block = tl.load(left + out_row[:, None] * ROWS + row[None, :])
            for i in tl.static_range(PARTS):
                total = tl.dot(block, _split(part, PARTS, PT, i), total)
        else:
            total = part
    where = ((out_row < TILE) & (start + out_row < rows))[:, None] & (column < D2)[None, :]
    out = y + (start + out_row)[:, None] * D2 + column[None, :]
    tl.store(out, (total * factor).to(y.dtype.element_ty), mask=where)


def plan(block: int, wanted_rows: int) -> tuple[int, int, int, int]:
    """(d1, d2, rows per tile, rows padded to a power of two) for runs of `block` channels and about
    `wanted_rows` rows.
    """
    m, power = factors(block)
    d2 = min(power, 64)
    while d2 < min(power, 128) and block // d2 > 128:
        d2 *= 2
    d1 = block // d2
    tile = d1 * max(1, wanted_rows // d1)
    return d1, d2, tile, max(16, triton.next_power_of_2(tile))


@functools.lru_cache(maxsize=64)
def _matrices(
    block: int,
    d1: int,
    d2: int,
    tile: int,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    part: torch.dtype,
):
    """(left [rows, rows] in `part`, right [max(16, d2)]^2 in `dtype`). A few hundred KB per block size and
    device.
    """
    m, power = factors(block)
    small = torch.kron(matrix(m), matrix(power // d2)) if d1 > 1 else matrix(1)
    left = torch.zeros(rows, rows)
    left[:tile, :tile] = torch.block_diag(*([small.float()] * (tile // d1)))
    width = max(16, d2)
    right = torch.zeros(width, width)
    right[:d2, :d2] = matrix(d2).float()
    return persistent(lambda: (left.to(device, part), right.to(device, dtype)), device)


def hadamard(x: Tensor, block: int) -> Tensor:
    """x [..., K] times the orthonormal Hadamard matrix on each run of `block` channels, in x's dtype."""
    block = resolved(block, x.shape[-1])
    source = x.contiguous()
    y = torch.empty_like(source)
    if source.numel() == 0:
        return y
    settings = dispatch.config("hadamard", 16, x.dtype, source.numel() // block, block, block)
    d1, d2, tile, rows = plan(block, settings.pop("ROWS"))
    step = min(rows, settings.pop("STEP"))
    exact = x.dtype == torch.float16
    first = torch.float32 if INTERPRETED else torch.float16 if exact else torch.bfloat16
    between = torch.float32 if INTERPRETED else torch.bfloat16
    left, right = _matrices(block, d1, d2, tile, rows, x.device, first, between)
    count = source.numel() // d2
    launch(
        hadamard_kernel,
        (cdiv(count, tile),),
        source,
        y,
        left,
        right,
        count,
        block**-0.5,
        D2=d2,
        WIDTH=max(16, d2),
        TILE=tile,
        ROWS=rows,
        STEP=step if d1 > 1 else rows,
        LEFT=d1 > 1,
        IN_PARTS=3 if x.dtype == torch.float32 and not INTERPRETED else 1,
        PARTS=1 if INTERPRETED else 3 if x.dtype == torch.float32 else 2,
        IT=COMPUTE[first],
        PT=COMPUTE[between],
        **settings,
    )
    return y


def _case(dtype: str, block: int) -> tuple:
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    settings = dispatch.packaged("hadamard", 16, torch_dtype, 4096, block, block, 80)
    d1, d2, tile, padded = plan(block, settings["ROWS"])
    it = tl.float16 if dtype == "fp16" else tl.bfloat16
    pointers = {
        "x": "*" + dtype,
        "y": "*" + dtype,
        "left": "*bf16",
        "right": "*fp16" if dtype == "fp16" else "*bf16",
    }
    constants = {
        "D2": d2,
        "WIDTH": max(16, d2),
        "TILE": tile,
        "ROWS": padded,
        "STEP": min(padded, settings["STEP"]) if d1 > 1 else padded,
        "LEFT": d1 > 1,
        "IN_PARTS": 3 if dtype == "fp32" else 1,
        "PARTS": 3 if dtype == "fp32" else 2,
        "IT": it,
        "PT": tl.bfloat16,
    }
    signature = {**pointers, "rows": "i32", "factor": "fp32"}
    return f"hadamard-{block}-{dtype}", hadamard_kernel, signature, constants, launch_options(settings), None


def aot_cases() -> list[tuple]:
    """What the AOT gate compiles: no left matrix, one of m = 1, one of m = 28, and the split of fp32."""
    return [_case("bf16", 4096), _case("bf16", 14336), _case("fp16", 64), _case("fp32", 128)]
