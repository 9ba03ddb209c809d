"""The int4 kernel under decoding: the same weight for every grid it takes, sums within the bound its file
states, refusals.
"""

import itertools

import lowbit_kernels as kernels
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowbit_kernels.decode_cpu import INT4_GROUPS
from torch import Tensor

from lowbit_ft.grid import IntGrid, PackedWeight
from tests.packed_tools import random_weight

GRIDS = [
    IntGrid(bits=bits, group_size=g, symmetric=symmetric, residual_bits=0)
    for bits, g, symmetric in itertools.product((2, 3, 4), INT4_GROUPS, (True, False))
]


def make(grid: IntGrid, n: int, k: int, seed: int = 0) -> PackedWeight:
    weight = random_weight((n, k), grid, seed=seed)
    assert isinstance(weight, PackedWeight)
    return weight


def repacked(w: PackedWeight) -> kernels.Int4Weight:
    return kernels.int4_weight(w.codes, w.scale, w.zero, w.grid.bits, w.shape[1], w.grid.group_size)


def error_bound(x: Tensor, w: PackedWeight) -> Tensor:
    """The bound in the docstring of decode_cpu.py, [M, N] in fp64."""
    u, k = 2.0**-8, x.shape[-1]
    exact, size = w.dequantize(torch.float32).double(), x.double().abs()
    scale = w.scale.double().repeat_interleave(w.grid.group_size, dim=0)  # [K, N]
    magnitude = size @ exact.abs().t()
    return (
        u * magnitude
        + 3 * u * (x.double() @ exact.t()).abs()
        + (k * 2.0**-22 + 4 * u * u) * (magnitude + 8 * size @ scale)
    )


def steps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many bfloat16 numbers lie between a and b, elementwise."""

    def place(t: Tensor) -> Tensor:  # the 16 bits of a float, in the order of the numbers
        bits = t.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (place(a) - place(b)).abs()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("n", [16, 48, 80])
def test_the_weight_is_the_same(grid: IntGrid, n: int) -> None:
    """Rows of x with a single 1 read the weight out."""
    k = 512
    w = make(grid, n, k)
    assert kernels.fits_int4(w.shape, grid.bits, grid.group_size, w.scale.dtype, False)
    eye, int4 = torch.eye(k, dtype=torch.bfloat16), repacked(w)
    rows = torch.cat([kernels.int4_linear(eye[i : i + 4], int4) for i in range(0, k, 4)])
    expected = w.dequantize(torch.bfloat16).t()
    assert torch.equal(
        expected, kernels.packed_matmul(eye, w.codes, w.scale, w.zero, None, grid.bits, grid.group_size)
    )
    if int4.rest is None:
        assert torch.equal(rows, expected)
    else:
        assert int(steps_apart(rows, expected).max()) <= 1
    assert (int4.rest is not None) == (grid.bits == 4 and not grid.symmetric)


def test_every_asymmetric_weight_there_is() -> None:
    """Each zero point with each mantissa a bfloat16 has and each code: shift + rest is scale * (8 - zero)
    exactly, and the weight read out is the packed op's to the last bit of a bfloat16."""
    scale = (1 + torch.arange(128) / 128).bfloat16().repeat(16)[None] * torch.tensor(
        2.0**-9, dtype=torch.bfloat16
    )
    zero = torch.arange(16, dtype=torch.uint8).repeat_interleave(128)[None]
    codes = kernels.pack((torch.arange(32) % 16).to(torch.uint8).expand(2048, 32), 4)
    int4 = kernels.int4_weight(codes, scale, zero, 4, 32, 32)
    assert int4.rest is not None
    exact = scale.double() * (8 - zero.double())
    assert (
        torch.equal(int4.scale_shift[..., 1].double() + int4.rest.double(), exact)
        and float(int4.rest.abs().max()) > 0
    )
    eye = torch.eye(32, dtype=torch.bfloat16)
    rows = torch.cat([kernels.int4_linear(eye[i : i + 4], int4) for i in range(0, 32, 4)])
    steps = steps_apart(rows, kernels.packed_matmul(eye, codes, scale, zero, None, 4, 32))
    assert int(steps.max()) == 1 and float((steps == 0).double().mean()) > 0.9


@given(
    st.sampled_from(GRIDS),
    st.integers(1, 4),
    st.sampled_from([16, 32, 96]),
    st.sampled_from([256, 512, 768]),
    st.integers(0, 2**20),
)
def test_sums_stay_within_the_bound(grid: IntGrid, m: int, n: int, k: int, seed: int) -> None:
    w = make(grid, n, k, seed)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16()
    x[:, ::3] *= 30  # a few large activations, as models have
    packed = kernels.packed_matmul(x, w.codes, w.scale, w.zero, None, grid.bits, grid.group_size)
    difference = (kernels.int4_linear(x, repacked(w)).double() - packed.double()).abs()
    assert bool((difference <= error_bound(x, w)).all())


def test_the_bound_notices_one_wrong_code() -> None:
    """It is not so wide that anything passes: one code of 512 off by one, with the x there not small."""
    grid = IntGrid(bits=4, group_size=64, residual_bits=0)
    w = make(grid, 16, 512)
    x = torch.full((1, 512), 0.05).bfloat16()
    x[0, 7] = 8.0
    codes = w.unpack_codes()
    codes[:, 7] = (codes[:, 7] + 1) % 16
    wrong = kernels.int4_weight(kernels.pack(codes, 4), w.scale, None, 4, 512, 64)
    packed = kernels.packed_matmul(x, w.codes, w.scale, None, None, 4, 64)
    assert bool(((kernels.int4_linear(x, wrong).double() - packed.double()).abs() > error_bound(x, w)).all())


def test_shapes_of_x() -> None:
    w = make(IntGrid(bits=4, group_size=64, residual_bits=0), 32, 128)
    x = torch.randn(2, 2, 128).bfloat16()
    y = kernels.int4_linear(x, repacked(w))
    assert y.shape == (2, 2, 32) and torch.equal(
        y.view(4, 32), kernels.int4_linear(x.view(4, 128), repacked(w))
    )
    strided = torch.randn(128, 3).bfloat16().t()
    assert torch.equal(
        kernels.int4_linear(strided, repacked(w)), kernels.int4_linear(strided.contiguous(), repacked(w))
    )


def test_what_does_not_fit() -> None:
    fits = dict(shape=(32, 256), bits=4, group_size=64, scale_dtype=torch.bfloat16, offset=False)
    assert kernels.fits_int4(**fits)
    for change in (
        {"shape": (24, 256)},
        {"shape": (32, 200)},
        {"bits": 8},
        {"group_size": -1},
        {"scale_dtype": torch.float16},
        {"scale_dtype": torch.float32},
        {"offset": True},
    ):
        assert not kernels.fits_int4(**{**fits, **change}), change
