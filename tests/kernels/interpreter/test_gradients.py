"""gradients_triton, all forms, against autograd of the equations in float64."""

import itertools

import pytest
import torch
from lowbit_kernels import dispatch, estimates, gradients_triton, grid_estimates
from lowbit_kernels.codes import UNITS

from tests.kernels.common import dense, error, integer_args

M, N, K = 20, 37, 300
FORMS = {
    "chunked": {
        "form": "chunked",
        "BLOCK_N": 16,
        "CHUNK_MB": 0.03,
        "SPAN": 4,
        "num_warps": 1,
        "num_stages": 1,
    },
    "blas": {"form": "blas", "BLOCK_N": 16, "CHUNK_MB": 0.03, "SPAN": 4, "num_warps": 1, "num_stages": 1},
    "fused": {
        "form": "fused",
        "BLOCK_N": 16,
        "BLOCK_M": 16,
        "BLOCK_K": 128,
        "GROUP_N": 2,
        "num_warps": 1,
        "num_stages": 1,
    },
}
WHAT = ("scale", "offset", "a", "b")
CASES = [
    # (bits, group size, residual bits, units, zero, clip_first), every value of each in both forms
    (4, 32, 4, "grid", True, False),
    (4, 128, 4, "live", True, True),
    (4, -1, 4, "weight", False, False),
    (3, 64, 2, "live", False, False),
    (2, 256, 4, "grid", True, True),
    (8, 96, 0, "weight", True, True),
    (3, -1, 1, "live", True, True),
    (6, 64, 2, "live", True, False),
]


def problem(bits, group_size, f, units, zero, clip_first, *, low_rank=True, rank=3, shape=(N, K)):
    """x, dy, arguments and the float64 gradients; no value near a tie or near an end of the clip."""
    for _ in range(20):
        args = integer_args(
            bits,
            group_size,
            f,
            units,
            zero=zero,
            offset=True,
            low_rank=low_rank,
            clip_first=clip_first,
            shape=shape,
        )
        if rank != 3:
            args["a"], args["b"] = torch.randn(rank, shape[1]) / 4, torch.randn(shape[0], rank) / 4
        value, weight, leaves = dense(args, shape[1])
        ends = (
            torch.minimum(value.abs(), (value - (2**bits - 1)).abs()).min()
            if low_rank or units == "live"
            else 1
        )
        if ((value % 1) - 0.5).abs().min() > 3e-6 and ends > 3e-6:
            break
    else:
        raise AssertionError("twenty draws with a tie")
    x, dy = torch.randn(M, shape[1]), torch.randn(M, shape[0])
    (x.double() @ weight.t()).backward(dy.double())
    return x, dy, args, {name: t.grad for name, t in leaves.items()}


def check(form: str, x, dy, args, want) -> tuple[torch.Tensor, ...]:
    """The gradients of this form, which are near those of float64."""
    with dispatch.override("grid_gradients", FORMS[form]):
        made = gradients_triton.grid_gradients(x, dy, **args)
    got = dict(zip(WHAT, made, strict=True))
    errors = {}
    for name, gradient in want.items():
        assert got[name].shape == gradient.shape and got[name].dtype == torch.float32
        errors[name] = error(got[name], gradient)
    assert max(errors.values()) < 5e-6, errors
    return made


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_gradient(form: str, case: tuple):
    check(form, *problem(*case))


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize(("group_size", "units"), [(32, "grid"), (-1, "grid"), (128, "live")])
def test_without_a_low_rank_part(form: str, group_size: int, units: str):
    # residual_bits 4: on a frozen grid without D the residual must not be looked at.
    x, dy, args, want = problem(
        4, group_size, 4 if units == "live" else 0, units, True, False, low_rank=False
    )
    da, db = check(form, x, dy, args, want)[2:]
    assert da.shape == db.shape == (0,)


@pytest.mark.parametrize("form", list(FORMS))
def test_rank_of_several_blocks(form: str):
    check(form, *problem(4, 64, 4, "grid", True, False, rank=70, shape=(20, 100)))


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("shape", [(1, 33), (16, 128), (50, 31)])
def test_ragged_shapes(form: str, shape: tuple[int, int]):
    check(form, *problem(4, 32, 4, "live", False, True, shape=shape))


def test_forms_agree_bit_for_bit_with_themselves_and_read_strided_inputs():
    x, dy, args, want = problem(4, 128, 4, "grid", True, False)
    wide_x, wide_dy = torch.full((M, K + 20), torch.nan), torch.full((M, N + 11), torch.nan)
    wide_x[:, :K], wide_dy[:, :N] = x, dy
    for form in FORMS:
        first = check(form, x, dy, args, want)
        again = check(form, wide_x[:, :K], wide_dy[:, :N], args, want)
        assert all(torch.equal(f, a) for f, a in zip(first, again, strict=True))


def test_values_far_outside_the_clip_are_masked():
    n, k = 20, 100
    for units, form in itertools.product(UNITS, FORMS):
        args = integer_args(units=units, f=0, shape=(n, k))
        args["b"] = args["b"] * 1e9
        x, dy = torch.randn(M, k), torch.randn(M, n)
        _, weight, leaves = dense(args, k)
        (x.double() @ weight.t()).backward(dy.double())
        with dispatch.override("grid_gradients", FORMS[form]):
            ds = gradients_triton.grid_gradients(x, dy, **args)[0]
        assert error(ds, leaves["scale"].grad) < 5e-6, (units, form)


@pytest.mark.parametrize("low_rank", ["factorised", "corrected"])
@pytest.mark.parametrize(("group_size", "units"), [(32, "grid"), (128, "weight"), (64, "live")])
def test_estimates_through_the_kernels(low_rank: str, group_size: int, units: str, monkeypatch):
    """The drawn tokens go through the Triton gradients and give what the reference gives for them."""
    args = integer_args(3, group_size, 4, units, zero=True, offset=True, clip_first=True, shape=(N, K))
    x, dy = torch.randn(M, K), torch.randn(M, N)
    monkeypatch.setattr(estimates, "random_start", lambda device: torch.tensor([0.4]))
    call = (x, dy, None, args["codes"], *args.values(), low_rank, 0.4, True, True)
    want, launches = grid_estimates(*call), []

    def launch(*given, **named):
        launches.append(given[0].shape)
        return gradients_triton.grid_gradients(*given, **named)

    definition = dispatch.definition("grid_gradients")
    monkeypatch.setattr(dispatch, "launcher", lambda op: launch)
    definition.register_kernel("cpu")(dispatch._implementation("grid_gradients"))
    try:
        with dispatch.override("grid_gradients", FORMS["chunked"]):
            got = grid_estimates(*call)
    finally:
        definition.register_kernel("cpu")(definition._init_fn)
    assert launches == [(8, K)]  # 8 of 20 tokens
    assert all(error(g, w.double()) < 5e-6 for g, w in zip(got, want, strict=True))
