"""codes_triton against float64 and, bit for bit, against the reference op."""

import itertools

import pytest
import torch
from lowbit_kernels import codes_triton, grid_codes, pack, unpack
from lowbit_kernels.codes import UNITS
from torch import Tensor

from tests.kernels.common import dense, integer_args

N, K = 19, 200


def untied(**kwargs) -> tuple[dict, Tensor]:
    """Arguments of grid_codes for which no value is near a rounding tie, and the codes of the equations in
    float64.
    """
    for _ in range(20):
        args = integer_args(shape=(N, K), **kwargs)
        value, _, _ = dense(args, K)
        if ((value % 1) - 0.5).abs().min() > 1e-5:
            args.pop("clip_first")
            return args, value.round().clamp(0, 2 ** args["bits"] - 1).long()
    raise AssertionError("twenty draws with a tie")


# Every pair of bits and residual bits: their superblocks meet in different ways. The rest rotates through the
# cases.
CASES = [
    (bits, f, (32, 128, -1, 64)[i % 4], UNITS[i % 3], bool(i // 2 % 2))
    for i, (bits, f) in enumerate(itertools.product((2, 3, 4, 8, 6), (0, 1, 2, 4)))
] + [(4, 4, g, units, zero) for g, units, zero in itertools.product((32, -1), UNITS, (False, True))]


@pytest.mark.parametrize(("bits", "f", "group_size", "units", "zero"), CASES)
def test_codes(bits: int, f: int, group_size: int, units: str, zero: bool):
    offset = units == "live" and zero
    args, want = untied(bits=bits, group_size=group_size, f=f, units=units, zero=zero, offset=offset)
    got = codes_triton.grid_codes(**args, in_features=K)
    assert torch.equal(unpack(got, bits, K).long(), want)
    assert want.min() == 0 and want.max() == 2**bits - 1, "no clipping: half of the op was not looked at"
    assert torch.equal(got, grid_codes(**args, in_features=K)), "the padding differs"


def test_given_the_same_product_the_bits_are_the_reference_s():
    """Small integers in A and B make D exact in any order; then every value, ties included, must round the
    same way.
    """
    for units, zero in itertools.product(UNITS, (False, True)):
        args = integer_args(shape=(N, K), units=units, zero=zero, offset=units == "live", f=0)
        args.pop("clip_first")
        args["a"], args["b"] = torch.randint(-3, 4, (3, K)).float(), torch.randint(-3, 4, (N, 3)).float()
        args["gain"] = 0.5  # half steps: with units "grid" half of the values are ties
        want = grid_codes(**args, in_features=K)
        assert torch.equal(codes_triton.grid_codes(**args, in_features=K), want), (units, zero)


@pytest.mark.parametrize("rank", [1, 16, 70])
def test_rank_of_several_blocks_and_low_precision_factors(rank: int):
    for dtype in (torch.float32, torch.bfloat16):
        args = integer_args(shape=(N, K))
        args.pop("clip_first")
        args["a"] = (torch.randint(-8, 9, (rank, K)) / 8).to(dtype)
        args["b"] = (torch.randint(-8, 9, (N, rank)) / 8).to(dtype)
        args["gain"] = 0.25
        got = codes_triton.grid_codes(**args, in_features=K)
        assert torch.equal(got, grid_codes(**args, in_features=K))


def test_without_a_low_rank_part():
    args = integer_args(shape=(N, K), low_rank=False, units="live", offset=True)
    args.pop("clip_first")
    want = grid_codes(**args, in_features=K)
    assert torch.equal(codes_triton.grid_codes(**args, in_features=K), want)
    args["units"] = "grid"
    frozen = codes_triton.grid_codes(**args, in_features=K)
    assert torch.equal(frozen, args["codes"]) and frozen.data_ptr() != args["codes"].data_ptr()


@pytest.mark.parametrize(
    ("bits", "f", "k"), [(2, 4, 100), (3, 4, 161), (8, 1, 65), (4, 4, 128), (3, 1, 33), (6, 4, 270)]
)
def test_ragged_rows_and_superblocks_that_end_apart(bits: int, f: int, k: int):
    """The residual's padding may end before or after the codes'."""
    args = integer_args(bits, 32, f, shape=(5, k))
    args.pop("clip_first")
    assert torch.equal(codes_triton.grid_codes(**args, in_features=k), grid_codes(**args, in_features=k))


def test_values_far_outside_clip():
    args = integer_args(shape=(N, K), f=0)
    args.pop("clip_first")
    args["b"] = args["b"] * 1e12
    got = unpack(codes_triton.grid_codes(**args, in_features=K), 4, K)
    product = args["b"] @ args["a"]
    assert torch.equal(
        got[product.abs() > 1e3], torch.where(product > 0, 15, 0).to(torch.uint8)[product.abs() > 1e3]
    )


def test_strided_rows_and_offsets_beyond_int32():
    """Rows 2^30 half-words apart: a 32-bit offset would wrap at the third row. The memory between is never
    touched.
    """
    args = integer_args(shape=(3, 64), group_size=32)
    args.pop("clip_first")
    want = grid_codes(**args, in_features=64)
    step = 1 << 30
    try:
        room = torch.UntypedStorage(2 * (2 * step + 64))
    except RuntimeError as error:
        pytest.skip(f"no 4 GB of address space: {error}")
    rows = torch.empty(0, dtype=torch.int16).set_(room, 0, (3, 32), (step, 1))  # type: ignore[arg-type]
    rows.copy_(args["codes"])
    got = codes_triton.grid_codes(**{**args, "codes": rows}, in_features=64)
    assert torch.equal(got, want)


def test_other_sizes_and_units_are_refused():
    args = integer_args(shape=(N, K))
    args.pop("clip_first")
    with pytest.raises(ValueError, match="group_size=48"):
        codes_triton.grid_codes(**{**args, "group_size": 48}, in_features=K)
    with pytest.raises(ValueError, match="'grid', 'weight', 'live'"):
        codes_triton.grid_codes(**{**args, "units": "step"}, in_features=K)


def test_every_code_is_reached():
    codes = (torch.arange(K) % 16).to(torch.uint8).repeat(N, 1)
    args = integer_args(shape=(N, K), f=4)
    args.pop("clip_first")
    args |= {"codes": pack(codes, 4), "a": torch.zeros(3, K)}
    assert torch.equal(unpack(codes_triton.grid_codes(**args, in_features=K), 4, K), codes)
