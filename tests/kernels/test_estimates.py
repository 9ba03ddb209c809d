"""Cheaper gradients (estimates.py) against float64 of their own equations, and their means over every draw
against the exact ones.
"""

import itertools

import lowbit_kernels as kernels
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowbit_kernels import estimates
from lowbit_kernels.grid import GridWeight
from torch import Tensor

from tests import reference
from tests.gemms import Gemms
from tests.kernels.common import K, N, R, error, integer_args

M = 7
TOLERANCE = 1e-5
pytestmark = pytest.mark.usefixtures("poison")


def backward(args: dict, x: Tensor, dy: Tensor, **options) -> dict[str, Tensor]:
    """Gradients of grid_linear by name."""
    leaves = {
        n: args[n].clone().requires_grad_() for n in ("a", "b", "scale", "offset") if args[n] is not None
    }
    x = x.clone().requires_grad_()
    kernels.grid_linear(x, **{**args, **leaves}, **options).backward(dy)
    return {"x": x.grad, **{n: t.grad for n, t in leaves.items()}}


def every_start(x: Tensor, dy: Tensor, tokens: float) -> list[tuple[Tensor, float]]:
    """(start, probability) of every draw that can come: between two starts at which a point passes from one
    token to the next, nothing changes, so the middle of each such stretch stands for it."""
    count = estimates.drawn_count(len(x), tokens)
    ends = estimates.lengths(x, dy).cumsum(0).double()
    passes = (ends * (count / ends[-1]))[:, None] - torch.arange(count)
    edges = torch.cat([torch.tensor([0.0, 1.0]).double(), passes[(passes > 0) & (passes < 1)]]).sort().values
    return [((a + b)[None] / 2, (b - a).item()) for a, b in zip(edges, edges[1:], strict=False) if b > a]


def mean_over_draws(
    run, x: Tensor, dy: Tensor, tokens: float, monkeypatch
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The expectation of run() -> gradients by name over the start, and the gradients of every draw."""
    draws, mean = [], {}
    for start, probability in every_start(x, dy, tokens):
        monkeypatch.setattr(estimates, "random_start", lambda device, s=start: s)
        draws.append(run())
        for name, gradient in draws[-1].items():
            mean[name] = mean.get(name, 0) + probability * gradient.double()
    return mean, draws


def unmasked(args: dict, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """dA and dB as if nothing were clipped, float64."""

    def wide(t):
        return reference.columns(t, K, args["group_size"])

    dw = dy.double().t() @ x.double()
    factor = {
        "grid": lambda: wide(args["scale"]),
        "weight": lambda: wide(args["scale"]) / wide(args["scale0"]),
        "live": lambda: 1.0,
    }
    dd = dw * factor[args["units"]]()
    return {"a": args["gain"] * args["b"].double().t() @ dd, "b": args["gain"] * dd @ args["a"].double().t()}


@pytest.mark.parametrize(
    ("group_size", "units"), list(itertools.product((32, 64, 128, -1), ("grid", "weight", "live")))
)
@pytest.mark.parametrize("at_once", [1, 1 << 23], ids=["a group at a time", "all groups"])
def test_factorised_is_its_own_equation(
    group_size: int, units: str, at_once: int, monkeypatch: pytest.MonkeyPatch
):
    """K = 200 leaves a ragged last group; at g = 32 the cheaper order is through dW, at 64 and more through
    the groups.
    """
    monkeypatch.setattr(estimates, "TRANSIENT", at_once)
    args = integer_args(group_size=group_size, units=units, offset=units == "live")
    x, dy = torch.randn(M, K), torch.randn(M, N)
    got, want = backward(args, x, dy, low_rank="factorised"), unmasked(args, x, dy)
    exact = backward(args, x, dy)
    assert max(error(got[name], want[name]) for name in want) < TOLERANCE
    assert error(exact["b"], want["b"]) > 0.02, "nothing is clipped: this case proves little"
    for name in got.keys() - want.keys():  # with all tokens, scales and offsets are the exact ones
        assert error(got[name], exact[name].double()) < TOLERANCE, name


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_orders_of_contraction_agree(group_size: int, weighted: bool):
    x, dy, a, b = torch.randn(M, K), torch.randn(M, N), torch.randn(R, K), torch.randn(N, R)
    factor = torch.rand(kernels.group_count(K, group_size), N)
    weights = torch.randn(M, 1) if weighted else None
    by_groups = Gemms()
    with by_groups:
        # A low rank makes the groups the cheaper order, whatever their size
        got = estimates.factorised(x, dy, a[:1], b[:, :1], factor, 0.7, group_size, weights)
    assert by_groups.flops < 2 * M * N * K
    want = estimates._by_rows(
        x, dy if weights is None else dy * weights, a[:1], 0.7 * b[:, :1], factor, 0.7, group_size
    )
    assert max(error(g, w.double()) for g, w in zip(got, want, strict=True)) < TOLERANCE
    by_rows = Gemms()
    with by_rows:
        estimates.factorised(
            x.repeat(9, 1), dy.repeat(9, 1), a.repeat(20, 1), b.repeat(1, 20), factor, 0.7, group_size, None
        )
    assert by_rows.calls.count((N, 9 * M, K)) == 1, "at a rank above the group size, dW is the cheaper way"


@given(
    seed=st.integers(0, 2**16),
    bits=st.sampled_from((2, 3, 4, 6, 8)),
    group_size=st.sampled_from((32, 64, 128, -1)),
    units=st.sampled_from(("grid", "weight")),
    zero=st.booleans(),
    low_rank=st.sampled_from(("factorised", "corrected")),
)
def test_where_nothing_is_clipped_the_low_rank_gradient_is_the_exact_one(
    seed, bits, group_size, units, zero, low_rank
):
    torch.manual_seed(seed)
    args = integer_args(bits=bits, group_size=group_size, units=units, zero=zero)
    args["b"] *= 1e-4  # |D| far below what the residual leaves to the clip
    x, dy = torch.randn(M, K), torch.randn(M, N)
    got, want = (
        backward(args, x, dy, low_rank=how, tokens=0.5 if how != "exact" else 1.0)
        for how in (low_rank, "exact")
    )
    # corrected: factorised(all) + (exact - factorised)(drawn) cancels to rounding
    assert max(error(got[name], want[name].double()) for name in ("a", "b", "x")) < TOLERANCE


# None: a method without A and B, whose grid is frozen
KINDS = [
    (units, low_rank)
    for units in ("grid", "weight", "live")
    for low_rank in ("factorised", "corrected", None)
    if low_rank or units == "grid"
]


@pytest.mark.parametrize(("units", "low_rank"), KINDS)
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("tokens", [0.01, 0.3, 0.5, 0.8])
def test_the_mean_over_all_draws_is_the_whole(
    units: str, group_size: int, low_rank: str | None, tokens: float, monkeypatch
):
    """The start is the only random thing, and what it can bring is finite: every draw, weighted with its
    probability.
    """
    args = integer_args(
        group_size=group_size,
        units=units,
        low_rank=low_rank is not None,
        offset=units == "live",
        clip_first=True,
    )
    x, dy = torch.randn(M, K), torch.randn(M, N) * torch.rand(M, 1)
    options = {"low_rank": low_rank or "exact", "tokens": tokens}
    mean, draws = mean_over_draws(lambda: backward(args, x, dy, **options), x, dy, tokens, monkeypatch)
    want = backward(args, x, dy) | (unmasked(args, x, dy) if low_rank == "factorised" else {})
    errors = {name: error(mean[name], want[name].double()) for name in want}
    assert max(errors.values()) < TOLERANCE, errors
    spread = max(error(d["scale"], want["scale"].double()) for d in draws)
    if group_size == -1 and units != "live":
        assert spread < TOLERANCE, "one scale per row needs no sample"
    else:
        assert spread > 0.05, "nothing was sampled"
    if low_rank == "corrected":
        assert max(error(d["b"], want["b"].double()) for d in draws) > 1e-3


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
@pytest.mark.parametrize("share", [0.01, 0.125, 0.5, 0.9])
def test_every_token_is_drawn_in_proportion_and_weighs_one(tokens: int, share: float):
    """Over all starts: the draws of a token times their weight are 1, and no weight is over ten times that of
    equal shares.
    """
    x, dy = torch.randn(tokens, 5), torch.randn(tokens, 4) * torch.rand(tokens, 1) ** 3
    length, count = estimates.lengths(x, dy), estimates.drawn_count(tokens, share)
    total = torch.zeros(tokens).double()
    for start, probability in every_start(x, dy, share):
        rows, weights, sums = estimates.drawn(length, count, start)
        assert len(rows) == count and (weights <= 11.2 * tokens / count).all()
        assert torch.allclose(torch.zeros(tokens).index_add_(0, rows, weights), sums, rtol=1e-5)
        total += probability * sums
    assert torch.allclose(total, torch.ones(tokens).double(), atol=1e-6)
    size = x.norm(dim=1) * dy.norm(dim=1)
    assert torch.allclose(
        length.double() / length.sum(), ((size + 0.1 * size.mean()) / (1.1 * size.sum())).double(), atol=1e-3
    )


def test_tokens_without_gradients_and_tokens_that_are_not_finite():
    x, dy = torch.randn(8, 5), torch.zeros(8, 4)
    assert (estimates.lengths(x, dy) == 1).all()
    dy[3] = torch.nan
    assert (estimates.lengths(x, dy) == 1).all()
    dy = torch.randn(8, 4)
    dy[5, 0] = torch.inf
    for start in torch.linspace(0, 0.99, 20):
        assert 5 in estimates.drawn(estimates.lengths(x, dy), 2, start[None])[0], (
            "an overflow must not be passed by"
        )


def test_corrected_from_all_tokens_is_exact():
    args = integer_args(group_size=64, bits=2)
    x, dy = torch.randn(M, K), torch.randn(M, N)
    got, want = backward(args, x, dy, low_rank="corrected"), backward(args, x, dy)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_draws_follow_the_generator():
    args = integer_args(group_size=32)
    x, dy = torch.randn(M, K), torch.randn(M, N)
    starts, state = [], torch.get_rng_state()
    for _ in range(2):
        torch.set_rng_state(state)
        starts.append([backward(args, x, dy, low_rank="factorised", tokens=0.3)["scale"] for _ in range(6)])
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True)), (
        "the same generator, the same draws: a resumed run"
    )
    assert len({t.sum().item() for t in starts[0]}) > 1, "every backward draws anew"


@pytest.mark.parametrize("low_rank", ["factorised", "corrected"])
@pytest.mark.parametrize("train", ["scale", "low rank"])
def test_what_is_not_asked_for_is_not_computed(low_rank: str, train: str):
    args = integer_args(group_size=32)
    for name in ("scale",) if train == "scale" else ("a", "b"):
        args[name].requires_grad_()
    with Gemms() as gemms:
        kernels.grid_linear(torch.randn(M, K), **args, low_rank=low_rank, tokens=0.3).sum().backward()
    assert (args["scale"].grad is None) == (train != "scale") and (args["a"].grad is None) == (
        train == "scale"
    )
    drawn = (N, 2, K)  # dW of 2 of 7 tokens
    assert (drawn in gemms.calls) == (train == "scale" or low_rank == "corrected")
    assert (N, M, K) not in gemms.calls or train != "scale"


# What a layer costs in GEMMs of M N K, at sizes where the low-rank product itself (r / M of one) is small
# beside it.
WHOLE = {
    "exact": (3.0, 1.0),
    "factorised 1/4": (2.5, 0.25),
    "factorised 1/8": (2.375, 0.125),
    "corrected 1/4": (2.5, 0.25),
}


@pytest.mark.parametrize("case", WHOLE)
def test_the_third_gemm_is_gone(case: str):
    """r = 16, g = 128: 2 r / g = 1/4. The bound leaves 6 % for terms of r / M, r / N and r / K."""
    m, n, k, r = 1280, 1024, 1152, 16
    want, tokens = WHOLE[case]
    args = {
        "codes": kernels.pack(torch.randint(0, 16, (n, k), dtype=torch.uint8), 4),
        "residual": None,
        "scale0": torch.ones(k // 128, n),
        "zero0": None,
        "a": torch.randn(r, k, requires_grad=True),
        "b": torch.randn(n, r, requires_grad=True),
        "delta": None,
        "rows": None,
        "scale": torch.ones(k // 128, n, requires_grad=True),
        "zero": None,
        "offset": None,
        "mask": None,
        "gain": 1.0,
        "units": "grid",
        "bits": 4,
        "residual_bits": 0,
        "lowest": 0,
        "group_size": 128,
        "clip_first": False,
    }
    x = torch.randn(m, k, requires_grad=True)
    low_rank = case.split()[0]
    codes = kernels.grid_codes(
        *(args[name] for name in GridWeight._fields[: GridWeight._fields.index("gain")]),
        1.0,
        "grid",
        4,
        0,
        0,
        k,
        128,
    )
    with Gemms() as gemms:
        y = kernels.grid_linear(
            x, **args, step_codes=codes, low_rank=low_rank, tokens=1.0 if low_rank == "exact" else tokens
        )
        y.backward(torch.randn(m, n))
    assert want <= gemms.flops / (2 * m * n * k) < want + 0.15, gemms.flops / (2 * m * n * k)
    assert ((n, m, k) in gemms.calls) == (case == "exact"), "dW of all tokens"


def test_bf16_stays_as_close_as_the_exact_form():
    args = integer_args(group_size=64)
    x, dy = torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
    want = unmasked(args, x, dy)
    got = backward(args, x, dy, low_rank="factorised")
    assert max(error(got[name], want[name]) for name in want) < 8e-3  # two roundings of 2^-9 in a row


def test_unknown_choices_are_refused():
    args = integer_args()
    for options in ({"low_rank": "sparse"}, {"tokens": 0.0}, {"tokens": 1.5}):
        with pytest.raises(ValueError, match="exact.*factorised.*corrected.*at most 1"):
            kernels.grid_linear(torch.randn(2, K), **args, **options)
