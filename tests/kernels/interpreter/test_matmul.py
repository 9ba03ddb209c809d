"""packed_matmul, packed_matmul_dx and dequantize in Triton, against float64, through the interpreter.

Here: every regime, bit width, kind of zero and group size, ragged M, N and K, split sums, poisoned pads,
offsets beyond 2^31, and the PTX of the unpack helpers, which the interpreter cannot run, evaluated
instruction by instruction on all half-words.
"""

import itertools
import re
from pathlib import Path

import lowbit_kernels as kernels
import numpy as np
import pytest
import torch
from lowbit_kernels import (
    dispatch,
    matmul_dequantize_triton,
    matmul_triton,
    matmul_weight_triton,
    triton_common,
)
from torch import Tensor

from tests.kernels.common import error

LAUNCH = {"num_warps": 1, "num_stages": 1}
FORWARD = {
    "decode": {"regime": "decode", "BLOCK_M": 8, "BLOCK_N": 16, "SPLIT_K": 1},
    "decode, split, unrolled": {"regime": "decode", "BLOCK_M": 16, "BLOCK_N": 32, "SPLIT_K": 3, "UNROLL": 2},
    "fused": {"regime": "fused", "BLOCK_M": 16, "BLOCK_N": 16, "GROUP_M": 2},
    "fused, split, unrolled": {"regime": "fused", "BLOCK_M": 16, "BLOCK_N": 32, "SPLIT_K": 2, "UNROLL": 2},
    "two_stage": {"regime": "two_stage", "CHUNK_MB": 1},
}
INPUT_GRADIENT = {
    "operand": {"regime": "fused", "BLOCK_M": 16, "BLOCK_N": 16, "JOIN": False},
    "operand, split": {"regime": "decode", "BLOCK_M": 16, "BLOCK_N": 16, "JOIN": False, "SPLIT_N": 3},
    "join": {"regime": "fused", "BLOCK_M": 16, "BLOCK_N": 32, "JOIN": True},
    "join, split": {"regime": "fused", "BLOCK_M": 16, "BLOCK_N": 16, "JOIN": True, "SPLIT_N": 2, "PLANES": 8},
    "two_stage": {"regime": "two_stage", "CHUNK_MB": 1},
}


def weight(bits: int, n: int, k: int, group: int, zero: str, offset: bool) -> tuple[list, Tensor]:
    """(codes, scale, zero, offset) with every code present, and W in float64."""
    groups = kernels.group_count(k, group)
    q = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    present = torch.arange(min(1 << bits, n * k), dtype=torch.uint8)
    q.view(-1)[: len(present)] = present
    scale = torch.rand(groups, n) + 0.25
    z = {
        "none": None,
        "integer": torch.randint(0, 1 << bits, (groups, n), dtype=torch.uint8),
        "float": torch.rand(groups, n) * (1 << bits),
    }[zero]
    t = torch.randn(groups, n) if offset else None
    of = torch.arange(k) // (group if group > 0 else k)
    middle = torch.full((groups, n), 2.0 ** (bits - 1)).double() if z is None else z.double()
    dense = scale.double()[of] * (q.t().double() - middle[of])
    if t is not None:
        dense = dense + t.double()[of]
    return [kernels.pack(q, bits), scale, z, t], dense.t()


def forward(name: str, x: Tensor, args: list, bits: int, group: int) -> Tensor:
    with dispatch.override("packed_matmul", {**LAUNCH, **FORWARD[name]}):
        return matmul_triton.packed_matmul(x, *args, bits, group)


def gradient(name: str, dy: Tensor, args: list, bits: int, k: int, group: int) -> Tensor:
    with dispatch.override("packed_matmul_dx", {**LAUNCH, **INPUT_GRADIENT[name]}):
        return matmul_triton.packed_matmul_dx(dy, *args, bits, k, group)


# Ragged on purpose: N no multiple of a block, K of no superblock, of no group. The interpreter is slow, so
# that shapes and zeros rotate: each regime meets every shape, each bit width every kind of zero.
SHAPES = [(17, 330, 64, 3), (40, 200, -1, 9), (24, 96, 32, 1), (20, 520, 128, 18), (16, 600, 256, 8)]
ZEROS = [
    ("none", False),
    ("integer", False),
    ("float", False),
    ("none", True),
    ("float", True),
    ("integer", True),
]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", FORWARD)
def test_forward_matches_float64(name: str, bits: int) -> None:
    for i in (bits, bits + 1):
        n, k, group, m = SHAPES[(i + len(name)) % len(SHAPES)]
        args, dense = weight(bits, n, k, group, *ZEROS[(i + list(FORWARD).index(name)) % len(ZEROS)])
        x = torch.randn(m, k)
        assert error(forward(name, x, args, bits, group), x.double() @ dense.t()) < 2e-6, (n, k, group, m)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", INPUT_GRADIENT)
def test_input_gradient_matches_float64(name: str, bits: int) -> None:
    for i in (bits, bits + 1):
        n, k, group, m = SHAPES[(i + len(name)) % len(SHAPES)]
        args, dense = weight(bits, n, k, group, *ZEROS[(i + list(INPUT_GRADIENT).index(name)) % len(ZEROS)])
        dy = torch.randn(m, n)
        assert error(gradient(name, dy, args, bits, k, group), dy.double() @ dense) < 2e-6, (n, k, group, m)


@pytest.mark.parametrize(("zero", "offset"), ZEROS)
@pytest.mark.parametrize("name", ["decode", "decode, split, unrolled", "fused"])
def test_every_kind_of_zero_in_long_and_short_groups(name: str, zero: str, offset: bool) -> None:
    for bits, group in ((3, 256), (4, 32), (4, -1)):
        args, dense = weight(bits, 16, 400, group, zero, offset)
        x = torch.randn(2, 400)
        assert error(forward(name, x, args, bits, group), x.double() @ dense.t()) < 2e-6, (bits, group)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs(dtype: torch.dtype) -> None:
    args, dense = weight(4, 24, 160, 32, "integer", False)
    x, dy = torch.randn(3, 160).to(dtype), torch.randn(3, 24).to(dtype)
    y, dx = forward("decode", x, args, 4, 32), gradient("operand", dy, args, 4, 160, 32)
    assert y.dtype == dx.dtype == dtype
    # The interpreter computes in fp32, so that the only rounding is the output's.
    step = torch.finfo(dtype).eps
    assert error(y, x.double() @ dense.t()) < step and error(dx, dy.double() @ dense) < step


def test_leading_dimensions_strides_and_empty_inputs() -> None:
    args, dense = weight(4, 24, 160, 32, "none", False)
    wide = torch.full((2, 3, 170), float("nan"))
    wide[..., 5:165] = torch.randn(2, 3, 160)
    x = wide[..., 5:165]  # rows 170 apart with NaN between them
    assert error(forward("decode", x, args, 4, 32), x.double() @ dense.t()) < 2e-6
    assert forward("fused", x, args, 4, 32).shape == (2, 3, 24)
    assert forward("decode", torch.randn(0, 160), args, 4, 32).shape == (0, 24)
    assert gradient("join", torch.randn(0, 24), args, 4, 160, 32).shape == (0, 160)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_pads_of_the_packed_buffer_do_not_matter(bits: int) -> None:
    k = 100
    args, dense = weight(bits, 20, k, 32, "integer", True)
    channels = kernels.pack(torch.full((20, k), (1 << bits) - 1, dtype=torch.uint8), bits)
    args[0] = args[0] | (channels ^ -1)  # every bit that is no channel's is set
    x, dy = torch.randn(3, k), torch.randn(3, 20)
    for name in ("decode", "fused"):
        assert error(forward(name, x, args, bits, 32), x.double() @ dense.t()) < 2e-6, name
    for name in ("operand", "join"):
        assert error(gradient(name, dy, args, bits, k, 32), dy.double() @ dense) < 2e-6, name


def test_rows_do_not_leak_into_each_other() -> None:
    """A NaN in one row of x stays in that row, also where a block reads rows that do not exist."""
    args, dense = weight(4, 20, 160, 32, "integer", False)
    x, dy = torch.randn(5, 160), torch.randn(5, 20)
    x[4, 7] = dy[4, 3] = float("nan")
    for name in FORWARD:
        y = forward(name, x, args, 4, 32)
        assert y[4].isnan().all() and error(y[:4], x[:4].double() @ dense.t()) < 2e-6, name
    for name in INPUT_GRADIENT:
        dx = gradient(name, dy, args, 4, 160, 32)
        assert dx[4].isnan().all() and error(dx[:4], dy[:4].double() @ dense) < 2e-6, name


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_dequantize_has_the_bits_of_the_reference(bits: int) -> None:
    for (n, k, group, _), (zero, offset) in zip(SHAPES, ZEROS, strict=False):
        args, _ = weight(bits, n, k, group, zero, offset)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got = matmul_triton.dequantize(*args, bits, k, group, dtype)
            assert torch.equal(got, kernels.dequantize(*args, bits, k, group, dtype)), (n, k, group, dtype)


def test_the_two_stage_regime_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    args, dense = weight(4, 300, 300, 64, "integer", False)
    x, dy = torch.randn(4, 300), torch.randn(4, 300)
    monkeypatch.setattr(matmul_dequantize_triton, "COLUMNS", 128)
    chunks = []
    whole = matmul_dequantize_triton.dequantize_into

    def watched(out: Tensor, *rest: object) -> None:
        chunks.append(tuple(out.shape))
        whole(out, *rest)

    monkeypatch.setattr(matmul_dequantize_triton, "dequantize_into", watched)
    config = {"regime": "two_stage", "CHUNK_MB": 128 * 300 * 4 / 2**20}
    with dispatch.override("packed_matmul", config):
        assert error(matmul_triton.packed_matmul(x, *args, 4, 64), x.double() @ dense.t()) < 2e-6
    assert chunks == [(128, 300), (128, 300), (44, 300)]
    chunks.clear()
    with dispatch.override("packed_matmul_dx", config):
        assert error(matmul_triton.packed_matmul_dx(dy, *args, 4, 300, 64), dy.double() @ dense) < 2e-6
    assert chunks == [(300, 128), (300, 128), (300, 44)]


def test_split_sums_are_the_same_in_every_run_and_leave_the_counters_at_zero() -> None:
    args, _ = weight(4, 40, 600, 128, "none", False)
    x = torch.randn(3, 600)
    seen: list[Tensor] = []
    real = matmul_weight_triton.counters

    def watched(count: int, device: torch.device) -> Tensor:
        seen.append(real(count, device))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul_weight_triton, "counters", watched)
        first = forward("decode, split, unrolled", x, args, 4, 128)
        assert torch.equal(first, forward("decode, split, unrolled", x, args, 4, 128))
    assert len(seen) == 2 and all((c == 0).all() and c.numel() > 0 for c in seen)


def test_row_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """A weight whose two rows lie more than 2^31 half-words apart in a sparse file: address space, not
    memory.
    """
    k, far = 128, (1 << 31) + 64
    args, dense = weight(4, 2, k, 32, "none", False)
    memory = torch.from_file(str(tmp_path / "weight"), shared=True, size=far + 64, dtype=torch.int16)
    spread = memory.as_strided((2, 32), (far, 1))
    args[0] = spread.copy_(args[0])
    x, dy = torch.randn(2, k), torch.randn(2, 2)
    for name in ("decode", "fused"):
        assert error(forward(name, x, args, 4, 32), x.double() @ dense.t()) < 2e-6, name
    for name in ("operand", "join"):
        assert error(gradient(name, dy, args, 4, k, 32), dy.double() @ dense) < 2e-6, name
    assert error(matmul_triton.dequantize(*args, 4, k, 32, torch.float32), dense) < 2e-6


def test_groups_that_split_a_plane_are_refused() -> None:
    args, _ = weight(4, 8, 96, 48, "none", False)
    assert not triton_common.supported(4, 48, 96) and triton_common.supported(4, 96, 96)
    with pytest.raises(ValueError, match="group_size=48"):
        forward("decode", torch.randn(1, 96), args, 4, 48)


# ----------------------------------------------------------------------------------------- the PTX, evaluated


def _bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _fp16(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint16).view(np.float16).astype(np.float64)


def _to_bits(values: np.ndarray, bf16: bool) -> np.ndarray:
    """Nearest 16-bit float to float64 values, as bits; exact values only are asked for here."""
    if not bf16:
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    bits = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    return bits.astype(np.uint16).astype(np.uint32)


def run_ptx(text: str, bf16: bool, *inputs: np.ndarray) -> np.ndarray:
    """Evaluate the few instructions our helpers use, on arrays of 32-bit registers. Returns $0."""
    registers = {f"${i + 1}": value.astype(np.uint32) for i, value in enumerate(inputs)}
    decode = _bf16 if bf16 else _fp16

    def read(name: str) -> np.ndarray:
        if name in registers:
            return registers[name]
        return np.full_like(inputs[0], int(name, 0), dtype=np.uint32)

    def halves(name: str) -> tuple[np.ndarray, np.ndarray]:
        value = read(name)
        return decode(value & 0xFFFF), decode(value >> 16)

    for line in re.sub(r"\{|\}|\.reg[^;]*;", " ", text).split(";"):
        if not (line := line.strip()):
            continue
        operation, operands = line.split(None, 1)
        out, *sources = [part.strip() for part in operands.split(",")]
        if operation == "mov.b32":
            result = read(sources[0])
        elif operation == "shr.u32":
            result = read(sources[0]) >> np.uint32(int(sources[1]))
        elif operation == "shl.b32":
            result = read(sources[0]) << np.uint32(int(sources[1]))
        elif operation == "lop3.b32":
            a, b, c = (read(name) for name in sources[:3])
            table = int(sources[3], 0)
            result = np.zeros_like(a)
            for i, (p, q, r) in enumerate(itertools.product((0, 1), repeat=3)):
                if table >> i & 1:
                    result |= (a if p else ~a) & (b if q else ~b) & (c if r else ~c)
        elif operation.startswith("fma.rn.") or operation.startswith("mul.rn."):
            assert operation.endswith("bf16x2" if bf16 else ".f16x2"), operation
            terms = [halves(name) for name in sources]
            low, high = (
                terms[0][i] * terms[1][i] + terms[2][i] if len(terms) > 2 else terms[0][i] * terms[1][i]
                for i in (0, 1)
            )
            result = _to_bits(low, bf16) | _to_bits(high, bf16) << np.uint32(16)
        else:
            raise AssertionError(f"unknown instruction {line!r}")
        registers[out] = result.astype(np.uint32)
    return registers["$0"]


WORDS = np.arange(1 << 16, dtype=np.uint32)
PAIRS = WORDS | (np.roll(WORDS, 12345) << np.uint32(16))  # every half-word, beside another one


def _fields(plane: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    mask = np.uint32((1 << bits) - 1)
    return (PAIRS & 0xFFFF) >> np.uint32(bits * plane) & mask, (PAIRS >> 16) >> np.uint32(bits * plane) & mask


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_unpack_ptx_is_exact_on_every_half_word(bits: int, bf16: bool) -> None:
    decode = _bf16 if bf16 else _fp16
    for plane in {triton_common.place_of.fn(bits, plane) for plane in range(triton_common.fields(bits))}:
        low, high = _fields(plane, bits)
        for zero in (0, 1 << (bits - 1)):
            out = run_ptx(triton_common._magic_text.fn(bits, plane, zero, bf16), bf16, PAIRS)
            assert (decode(out & 0xFFFF) == low.astype(float) - zero).all(), (plane, zero)
            assert (decode(out >> 16) == high.astype(float) - zero).all(), (plane, zero)
        text = triton_common._magic_text.fn(bits, plane, None, bf16)
        for zero in range(1 << bits) if bits < 8 else (0, 1, 127, 128, 200, 255):
            # What codes_minus puts into $2.
            base = -128.0 if bits == 8 and bf16 else triton_common._base.fn(bits, plane, bf16)
            add = _to_bits(np.array([-base - zero]), bf16)[0]
            assert decode(np.array([add]))[0] == -base - zero, "not a 16-bit float"
            out = run_ptx(text, bf16, PAIRS, np.full_like(PAIRS, add | add << np.uint32(16)))
            assert (decode(out & 0xFFFF) == low.astype(float) - zero).all(), (plane, zero)
            assert (decode(out >> 16) == high.astype(float) - zero).all(), (plane, zero)


@pytest.mark.parametrize("bf16", [True, False])
def test_sign_ptx_is_exact_on_every_half_word(bf16: bool) -> None:
    decode = _bf16 if bf16 else _fp16
    for plane in range(16):
        out = run_ptx(triton_common._sign_text.fn(plane, bf16), bf16, PAIRS)
        low, high = _fields(plane, 1)
        assert (decode(out & 0xFFFF) == 2.0 * low - 1).all() and (decode(out >> 16) == 2.0 * high - 1).all()


@pytest.mark.parametrize("bf16", [True, False])
def test_packed_products_round_once(bf16: bool) -> None:
    """mul16 on sm_80 is a fused multiply-add of -0: the same product, and a zero keeps its sign."""
    decode = _bf16 if bf16 else _fp16
    a = _to_bits(np.array([3.0, -0.0, -7.0, 0.0]), bf16)
    b = _to_bits(np.array([0.3359375, 2.0, 1.5, -2.0]), bf16)
    twice_a, twice_b = a | a << np.uint32(16), b | b << np.uint32(16)
    out = run_ptx(triton_common._mul_text.fn(bf16), bf16, twice_a, twice_b)
    want = _to_bits(decode(a) * decode(b), bf16)
    assert ((out & 0xFFFF) == want).all() and ((out >> 16) == want).all()
    out = run_ptx(triton_common._fma_text.fn(bf16), bf16, twice_a, twice_b, twice_b)
    assert ((out & 0xFFFF) == _to_bits(decode(a) * decode(b) + decode(b), bf16)).all()


def test_the_starting_table_gives_every_regime() -> None:
    """The packaged entries of the interpreter: what `dispatch` runs when nobody overrides."""
    args, dense = weight(4, 40, 200, 64, "integer", False)
    regimes = set()
    for m in (1, 16, 70):
        regimes.add(dispatch.config("packed_matmul", 4, torch.float32, m, 40, 200)["regime"])
        x, dy = torch.randn(m, 200), torch.randn(m, 40)
        assert error(matmul_triton.packed_matmul(x, *args, 4, 64), x.double() @ dense.t()) < 2e-6
        assert error(matmul_triton.packed_matmul_dx(dy, *args, 4, 200, 64), dy.double() @ dense) < 2e-6
    assert regimes == {"decode", "fused", "two_stage"}
