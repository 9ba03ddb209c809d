"""Scratch memory of the Triton launchers, from shapes alone: the rules they cut their work by, and what they
hold at their peak.

Needs no Triton and no GPU, so that memory can be planned anywhere; the launchers call the same rules.
`scratch` answers for one call of an op: bytes beyond its arguments, outputs included, at the worst moment.
The reference implementations have no rules here: what they hold is found by running them on meta tensors.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .grid import GridWeight
from .layout import LANES, group_count, packed_width, superblock

PROJECTION_BLOCK = (
    32  # columns of dB summed together in registers, twice; larger ranks write dB strip by strip
)
FEW_ROWS = 32  # rows of a tile where its operands take twice the registers, or more than there are
# the narrowest chunk of channels that is worth a product of its own, even where it outgrows its share of L2
COLUMNS = 256


def even_steps(total: int, most: int, multiple: int) -> int:
    """The size of equal chunks of `total`, each a multiple of `multiple` and, if that can be, at most
    `most`.
    """
    chunks = -(-total // max(multiple, most // multiple * multiple))
    each = -(-total // chunks)
    return -(-each // multiple) * multiple


def split(
    wanted: int, tiles: int, steps: int, unroll: int = 1, arch: int | None = None, waves: float = 2.0
) -> tuple[int, int]:
    """(parts, steps per part) of a sum of `steps` steps; wanted 0: as many as give the device `waves`
    programs per multiprocessor.
    """
    wanted = wanted or dispatch.split_k(tiles, steps, arch, waves)
    per = -(-max(1, -(-steps // wanted)) // unroll) * unroll
    return max(1, -(-steps // per)), per


def forward_split(
    m: int, n: int, k: int, bits: int, config: dict[str, Any], arch: int | None = None
) -> tuple[int, int]:
    """(parts, superblocks per part) of a decode or fused forward."""
    tiles = -(-m // config["BLOCK_M"]) * -(-n // config["BLOCK_N"])
    steps, unroll = -(-k // superblock(bits)), config.get("UNROLL", 1)
    return split(config.get("SPLIT_K", 1), tiles, steps, unroll, arch, config.get("WAVES", 2.0))


def forward_rows(n: int, k: int, itemsize: int, config: dict[str, Any]) -> int:
    """Rows of W in the scratch of the two-stage forward."""
    return min(even_steps(n, config["CHUNK_MB"] * 2**20 // (k * itemsize), 128), n)


def dx_columns(n: int, k: int, itemsize: int, bits: int, config: dict[str, Any], least: int = COLUMNS) -> int:
    """Channels of W in the scratch of the two-stage dX."""
    return min(even_steps(k, max(least, config["CHUNK_MB"] * 2**20 // (n * itemsize)), superblock(bits)), k)


# What takes the place of the fused form where that cannot be: its tiles are too large for the chunked one.
CHUNKED = {"form": "chunked", "BLOCK_N": 64, "CHUNK_MB": 24, "num_warps": 4, "num_stages": 1, "maxnreg": 255}


def gradient_form(
    config: dict[str, Any], rank: int, dtype: torch.dtype, interpreted: bool, masked: bool
) -> dict[str, Any]:
    """The entry of the table as it is used. Without a low-rank part there is nothing to project, and dD of
    fp16 inputs may be too small for fp16: there "blas" is "chunked". On chip dB is summed over a tile in
    registers, so the rank must be one or two blocks; and fp32 inputs take the BLAS on a GPU, whose product
    obeys the user's settings for tf32.

    Tiles have fewer rows where inputs are fp32, whose split products need twice the operands, and where a
    mask meets a dB of two blocks, which leave no register for it."""
    used = _gradient_form(config, rank, dtype, interpreted)
    full = masked and used["form"] == "chunked" and PROJECTION_BLOCK < rank <= 2 * PROJECTION_BLOCK
    if full or dtype == torch.float32:
        return used | {"BLOCK_N": min(used["BLOCK_N"], FEW_ROWS)}
    return used


def _gradient_form(
    config: dict[str, Any], rank: int, dtype: torch.dtype, interpreted: bool
) -> dict[str, Any]:
    if config["form"] == "fused" and (
        rank > 2 * PROJECTION_BLOCK or (dtype == torch.float32 and not interpreted)
    ):
        small = {"BLOCK_N": config["BLOCK_N"], "num_warps": 1, "num_stages": 1} if interpreted else {}
        return CHUNKED | small
    if config["form"] == "blas" and (not rank or dtype == torch.float16):
        return {name: value for name, value in config.items() if name != "SPAN"} | {"form": "chunked"}
    return config


def gradient_chunk(n: int, k: int, rank: int, itemsize: int, config: dict[str, Any]) -> tuple[int, int]:
    """(rows of dW in scratch at a time, strips of 32 channels whose part of dB is summed in registers) of
    the chunked form.
    """
    block, strips = config["BLOCK_N"], -(-k // LANES)
    if config["form"] == "blas":
        rows = max(1, int(config["CHUNK_MB"] * 2**20) // (k * itemsize + 8 * rank))
        return _whole_blocks(rows, n, block), config["SPAN"]
    span = (
        min(config.get("SPAN", 32), 1 << math.ceil(math.log2(strips))) if rank <= 2 * PROJECTION_BLOCK else 1
    )
    spans = -(-strips // span)
    # All scratch of a chunk together, per row: dW, its part of dA's partial sums and of dB's.
    per_row = k * itemsize + 4 * k * rank // block + 4 * spans * rank
    rows = max(1, int(config.get("CHUNK_MB", 24) * 2**20) // per_row)
    return _whole_blocks(rows, n, block), span


def row_chunk(moved: int, k: int, itemsize: int, config: dict[str, Any]) -> int:
    """Chosen rows of dW in scratch at a time, of grid_row_gradients."""
    return _whole_blocks(int(config["CHUNK_MB"] * 2**20) // (k * itemsize), moved, config["BLOCK_N"])


def _whole_blocks(rows: int, n: int, block: int) -> int:
    """`rows` of n as whole blocks, at least one; all n where they fit."""
    return n if rows >= n else max(block, rows // block * block)


def binary_rows(megabytes: int, other: int, itemsize: int, multiple: int) -> int:
    """How many rows (or channels) of `other` numbers fit in the scratch, a multiple of `multiple`."""
    return max(multiple, (megabytes << 20) // (other * itemsize) // multiple * multiple)


def scratch(op: str, args: tuple[Any, ...], arch: int) -> int:
    """Bytes that the Triton launcher of `op` holds at its peak beyond its arguments, on architecture `arch`;
    -1: no rule.

    args: the op's arguments; only shapes and dtypes of the tensors are read.
    """
    rule = _RULES.get(op)
    return -1 if rule is None else rule(args, arch)


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _matmul(args: tuple[Any, ...], arch: int) -> int:
    x, codes, _, _, _, bits, _ = args
    m, k, n, size = _rows(x), x.shape[-1], codes.shape[0], x.element_size()
    config = dispatch.config("packed_matmul", bits, x.dtype, m, n, k, arch)
    if config["regime"] != "two_stage":
        parts = forward_split(m, n, k, bits, config, arch)[0]  # of a split sum every part is written, in fp32
        return m * n * size + (parts * m * n * 4 if parts > 1 else 0)
    return m * n * size + forward_rows(n, k, size, config) * (-(-k // 8) * 8) * size


def _matmul_dx(args: tuple[Any, ...], arch: int) -> int:
    dy, codes, _, _, _, bits, k, _ = args
    m, n, size = _rows(dy), codes.shape[0], dy.element_size()
    config = dispatch.config("packed_matmul_dx", bits, dy.dtype, m, n, k, arch)
    if config["regime"] != "two_stage":
        return m * k * size
    return m * k * size + n * (-(-dx_columns(n, k, size, bits, config) // 8) * 8) * size


def _codes(args: tuple[Any, ...], arch: int) -> int:
    grid, (k, _) = GridWeight(*args[: len(GridWeight._fields)]), args[len(GridWeight._fields) :]
    return grid.codes.shape[0] * packed_width(k, grid.bits) * 2


def _gradients(args: tuple[Any, ...], arch: int) -> int:
    x, grid, group_size = args[0], GridWeight(*args[2 : 2 + len(GridWeight._fields)]), args[-2]
    codes, a, b, units, bits = grid.codes, grid.a, grid.b, grid.units, grid.bits
    (m, k), n, size = x.shape, codes.shape[0], x.element_size()
    rank = a.shape[0] if a is not None and b is not None else 0
    groups, strips = group_count(k, group_size), -(-k // LANES)
    if not rank and units != "live" and groups == 1 and grid.mask is None:
        unit = torch.empty((1, n), dtype=torch.float32, device="meta")
        product = _matmul((x, codes, unit, None, None, bits, -1), arch)
        return product + 2 * m * n * 4 + m * k * 4
    config = dispatch.config("grid_gradients", bits, x.dtype, m, n, k, arch)
    config = gradient_form(config, rank, x.dtype, arch == dispatch.INTERPRETER, grid.mask is not None)
    sums, results = 2 * strips * n * 4, 2 * groups * n * 4
    factors = (rank * k + n * rank) * 4
    if config["form"] == "fused":
        width = config.get("BLOCK_K", 128)
        partial = (-(-n // config["BLOCK_N"]) * rank * k + -(-k // width) * n * rank) * 4
        return sums + results + factors + partial
    rows, span = gradient_chunk(n, k, rank, size, config)
    if config["form"] == "blas":
        wide = 1 if size == 4 else 2  # A and B in two numbers of 16 bits, and the products with them
        partial = wide * rank * (n * size + k * size + 4 * k + 4 * min(rows, n))
        return sums + results + factors + min(rows, n) * k * size + partial
    blocks, spans = -(-min(rows, n) // config["BLOCK_N"]), -(-strips // span)
    partial = (blocks * rank * k + spans * n * rank) * 4
    return sums + results + factors + min(rows, n) * k * size + partial


def _row_gradients(args: tuple[Any, ...], arch: int) -> int:
    x, grid, group_size = args[0], GridWeight(*args[2 : 2 + len(GridWeight._fields)]), args[-2]
    (m, k), moved, size = x.shape, grid.moved, x.element_size()
    config = dispatch.config("grid_row_gradients", grid.bits, x.dtype, m, moved, k, arch)
    rows = row_chunk(moved, k, size, config)
    columns = 0 if grid.rows is None else m * rows * size  # of dY, where they do not lie side by side
    results = 2 * group_count(k, group_size) * moved * 4
    return moved * k * 4 + 2 * -(-k // LANES) * moved * 4 + rows * k * size + max(columns, results)


def _binary(args: tuple[Any, ...], arch: int) -> int:
    x, planes = args[0], args[1]
    m, k, n, size = _rows(x), x.shape[-1], planes.shape[1], x.element_size()
    config = dispatch.config("binary_matmul", planes.shape[0], x.dtype, m, n, k, arch)
    if config["regime"] != "two_stage":
        return m * n * size
    return m * n * size + min(n, binary_rows(config.get("CHUNK_MB", 24), k, size, 128)) * k * size


def _binary_dx(args: tuple[Any, ...], arch: int) -> int:
    dy, planes, k = args[0], args[1], args[4]
    m, n, size = _rows(dy), planes.shape[1], dy.element_size()
    config = dispatch.config("binary_matmul_dx", planes.shape[0], dy.dtype, m, n, k, arch)
    return m * k * size + n * min(k, binary_rows(config["CHUNK_MB"], n, size, superblock(1))) * size


def _binary_gradients(args: tuple[Any, ...], arch: int) -> int:
    x, dy, planes, group_size, trained = args
    (m, k), n, size = x.shape, dy.shape[-1], x.element_size()
    config = dispatch.config("binary_gradients", planes.shape[0], x.dtype, m, n, k, arch)
    results = (trained + 1) * group_count(k, group_size) * n * 4
    if config["form"] == "fused":
        return results
    return results + min(n, binary_rows(config.get("CHUNK_MB", 24), k, size, 128)) * k * size


_RULES = {
    "packed_matmul": _matmul,
    "packed_matmul_dx": _matmul_dx,
    "grid_codes": _codes,
    "grid_gradients": _gradients,
    "grid_row_gradients": _row_gradients,
    "binary_matmul": _binary,
    "binary_matmul_dx": _binary_dx,
    "binary_gradients": _binary_gradients,
}
