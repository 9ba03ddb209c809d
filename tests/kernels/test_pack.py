"""P16 and quantize_pack: round trips for every bit width and shape, and what the residual promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowbit_kernels import dequantize, group_count, pack, packed_width, quantize_pack, superblock, unpack
from lowbit_kernels.pack import decode_residual
from torch import Tensor

from tests import reference

pytestmark = pytest.mark.usefixtures("poison")
BITS = (1, 2, 3, 4, 6, 8)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 700))


@given(st.sampled_from(BITS), shapes, st.integers(0, 2**31))
def test_pack_and_unpack_are_inverse(bits: int, shape: tuple[int, int], seed: int):
    codes = torch.randint(
        0, 1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = pack(codes, bits)
    assert packed.dtype == torch.int16 and packed.shape == (shape[0], packed_width(shape[1], bits))
    assert torch.equal(unpack(packed, bits, shape[1]), codes)
    assert torch.equal(reference.unpack(packed, bits, shape[1]), codes.long())


@pytest.mark.parametrize("bits", BITS)
def test_every_code_survives_in_every_field(bits: int):
    block = superblock(bits)
    codes = (torch.arange(block).unsqueeze(0) + torch.arange(1 << bits).unsqueeze(1)) % (1 << bits)
    assert torch.equal(unpack(pack(codes.to(torch.uint8), bits), bits, block).long(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_code_zero_and_costs_less_than_a_superblock(bits: int):
    block = superblock(bits)
    for k in (1, block - 1, block, block + 1):
        packed = pack(torch.full((3, k), (1 << bits) - 1, dtype=torch.uint8), bits)
        whole = unpack(packed, bits, packed.shape[1] // 32 * block)
        assert (whole[:, :k] == (1 << bits) - 1).all() and not whole[:, k:].any()
        assert whole.shape[1] - k < block


@pytest.mark.parametrize("bits", [5, 7, 16, 0])
def test_other_widths_are_refused(bits: int):
    with pytest.raises(ValueError, match=f"bits={bits}"):
        superblock(bits)


def wide(groups: Tensor, k: int, group_size: int) -> Tensor:
    return reference.columns(groups, k, group_size).float()


def grid_of(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """A random grid that clips some of the weight."""
    shape = (group_count(weight.shape[1], group_size), weight.shape[0])
    scale = (torch.rand(shape) + 0.5) * 4 / (1 << bits) * torch.where(torch.rand(shape) < 0.5, -1.0, 1.0)
    zero = None if symmetric else torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    return scale.bfloat16(), zero


@given(
    st.sampled_from((2, 3, 4, 6, 8)),
    st.sampled_from((0, 1, 2, 4)),
    st.sampled_from((32, 64, 128, -1)),
    st.booleans(),
    shapes,
    st.integers(0, 2**31),
)
def test_quantize_pack(
    bits: int, f: int, group_size: int, symmetric: bool, shape: tuple[int, int], seed: int
):
    torch.manual_seed(seed)
    weight, (n, k), top = torch.randn(shape), shape, (1 << bits) - 1
    scale, zero = grid_of(weight, bits, group_size, symmetric)
    packed, residual = quantize_pack(weight, scale, zero, bits, group_size, f)

    # The code is round-half-even of weight / scale + zero, clipped, whatever f is.
    z = torch.full((n, k), 2.0 ** (bits - 1)) if zero is None else wide(zero, k, group_size)
    value = weight / wide(scale, k, group_size) + z
    code = unpack(packed, bits, k).float()
    assert torch.equal(code, value.round().clamp(0, top))
    # Inside the range the dense weight is within half a step.
    dense = dequantize(packed, scale, zero, None, bits, k, group_size, torch.float32)
    inside = (value >= 0) & (value <= top)
    step = wide(scale, k, group_size).abs()
    assert ((dense - weight).abs() <= step * 0.5 * (1 + 1e-5))[inside].all()

    if f == 0:
        assert residual.shape == (0,)
        return
    rho = decode_residual(residual, f, k)
    # Mid-rise: odd multiples of half an LSB, strictly inside half a step, so never a tie; rounding gives the
    # code again.
    assert torch.equal((rho + 0.5) * (1 << f) % 1, torch.full_like(rho, 0.5))
    assert (rho.abs() < 0.5).all()
    assert torch.equal((code + rho).round(), code)
    # With the residual the weight is known to half an LSB of 2^-f steps.
    assert ((code + rho - value).abs() <= 0.5 / (1 << f) + 1e-4)[inside].all()
    assert torch.equal(reference.unpack(residual, f, k), ((rho + 0.5) * (1 << f) - 0.5).long())


def test_clipped_weights_remember_the_clip_and_no_more():
    """The stored value is clipped (LR-QAT, Eq. 7): a weight far outside decodes to the edge plus the largest
    residual.
    """
    weight = torch.tensor([[-100.0, 100.0] * 16])
    packed, residual = quantize_pack(weight, torch.ones(1, 1), None, 4, -1, 4)
    rho = decode_residual(residual, 4, 32)
    assert unpack(packed, 4, 32)[0, :2].tolist() == [0, 15]
    assert rho[0, :2].tolist() == [-0.46875, 0.46875]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_quantize_pack_takes_any_float(dtype: torch.dtype):
    weight = torch.randn(5, 70).to(dtype)
    scale = torch.full((3, 5), 0.25)
    for got, want in zip(
        quantize_pack(weight, scale, None, 4, 32, 4),
        quantize_pack(weight.float(), scale, None, 4, 32, 4),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("bits", (2, 3, 4, 6, 8))
@pytest.mark.parametrize("group_size", (32, 128, -1))
def test_dequantize_is_the_formula_rounded_once(bits: int, group_size: int):
    n, k = 7, 200
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    shape = (group_count(k, group_size), n)
    scale, offset = torch.rand(shape).bfloat16(), torch.randn(shape).bfloat16()
    zero = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    packed = pack(codes, bits)
    for z, t in ((None, None), (zero, None), (None, offset), (zero, offset)):
        centre = 2.0 ** (bits - 1) if z is None else wide(z, k, group_size)
        want = wide(scale, k, group_size) * (codes.float() - centre)
        want = want if t is None else want + wide(t, k, group_size)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(dequantize(packed, scale, z, t, bits, k, group_size, dtype), want.to(dtype))
