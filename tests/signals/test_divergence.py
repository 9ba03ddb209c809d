"""The divergence against its equation in float64, value and gradient, whole and sparse; and what must hold
of any divergence, by hypothesis."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit_ft.recipe.sections.signal import SignalSection
from lowbit_ft.signals import Sparse, Whole, tokens
from lowbit_ft.signals.divergence import divergence, most_likely
from lowbit_ft.signals.logits import compared

KINDS = ["forward", "reverse", "symmetric"]


def logits(rows: int = 7, vocabulary: int = 19, seed: int = 0, size: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def equation(z: Tensor, theirs: Tensor, counted: Tensor, t: float, kind: str, k: int | None = None) -> Tensor:
    """T^2 KL, as it is written down: probabilities, no logsumexp, autograd."""
    q, p = (torch.exp(x / t) / torch.exp(x / t).sum(-1, keepdim=True) for x in (z, theirs))
    if k is not None and k < p.shape[-1]:
        ids = p.topk(k, -1).indices
        q, p = (
            torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], -1) for x in (q, p)
        )
    forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    value = {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[kind]
    return t**2 * value[counted].sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [None, 4, 19])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_are_the_equation(
    kind: Any, k: int | None, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "FLOATS_AT_A_TIME", 3 * 19)  # rows in chunks of 3
    ours, theirs = logits().requires_grad_(), logits(seed=1)
    counted = torch.tensor([True, True, False, True, True, False, True])
    want = equation(ours, theirs, counted, temperature, kind, k)
    (gradient,) = torch.autograd.grad(want * 0.7, ours)
    said = Whole(theirs) if k is None else most_likely(Whole(theirs), k, temperature)
    got = divergence(ours, said, counted, temperature, kind)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    (mine,) = torch.autograd.grad(got * 0.7, ours)
    torch.testing.assert_close(mine, gradient, rtol=1e-7, atol=1e-12)
    assert not mine[~counted].any() and mine[counted].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_logits_are_read_in_float32(kind: Any, dtype: torch.dtype) -> None:
    ours, theirs = logits().to(dtype).requires_grad_(), logits(seed=1).to(dtype)
    counted = torch.ones(7, dtype=torch.bool)
    exact = ours.detach().double().requires_grad_()
    want = equation(exact, theirs.double(), counted, 1.0, kind)
    got = divergence(ours, Whole(theirs), counted, 1.0, kind)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    want.backward()
    got.backward()
    assert ours.grad is not None and exact.grad is not None and ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-2, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(2, 23),
    st.floats(0.3, 4.0),
    st.sampled_from(KINDS),
    st.integers(0, 2**16),
    st.floats(0.1, 30.0),
)
def test_it_is_a_divergence(rows: int, v: int, t: float, kind: Any, seed: int, size: float) -> None:
    """Never negative; nothing, and no gradient, of equals; whole at k = V; joining outcomes never raises
    it."""
    ours, theirs = (
        logits(rows, v, seed, size).float().requires_grad_(),
        logits(rows, v, seed + 1, size).float(),
    )
    counted = torch.ones(rows, dtype=torch.bool)
    whole = divergence(ours, Whole(theirs), counted, t, kind)
    assert math.isfinite(whole.item()) and whole >= -1e-5 * rows * t**2
    for k in {1, v // 2 or 1, v}:
        said = most_likely(Whole(theirs), k, t)
        some = divergence(ours, said, counted, t, kind)
        assert math.isfinite(some.item()) and -1e-4 * rows * t**2 <= some <= whole * (1 + 1e-3) + 1e-4
        if k == v:
            torch.testing.assert_close(some, whole, rtol=1e-4, atol=1e-4)
        (gradient,) = torch.autograd.grad(some, ours)
        assert gradient.isfinite().all() and gradient.sum(-1).abs().max() <= 1e-2 * (1 + gradient.abs().max())
        torch.testing.assert_close(said.log_p.exp().sum(-1) + said.rest.exp(), torch.ones(rows))
    equal = divergence(ours, Whole(ours.detach()), counted, t, kind)
    (gradient,) = torch.autograd.grad(equal, ours)
    assert equal == 0 and not gradient.any()
    near = divergence(ours, most_likely(Whole(ours.detach()), max(1, v // 2), t), counted, t, kind)
    (gradient,) = torch.autograd.grad(near, ours)
    assert abs(near) <= 1e-5 * rows * max(1, t**2) and gradient.abs().max() <= 1e-5 * max(1, t)


def test_tables_padded_to_another_length_are_compared_over_what_both_have() -> None:
    ours, theirs = logits(vocabulary=19), logits(vocabulary=16, seed=1)
    counted = torch.ones(7, dtype=torch.bool)
    for a, b in ((ours, theirs), (theirs, ours)):
        a = a.clone().requires_grad_()
        got = divergence(a, Whole(b), counted)
        torch.testing.assert_close(got, equation(a[:, :16], b[:, :16], counted, 1.0, "forward"))
        (gradient,) = torch.autograd.grad(got, a)
        assert gradient.shape == a.shape and not gradient[:, 16:].any()


def test_impossible_tokens_are_no_nan() -> None:
    """A teacher that masks a token, and one so sure that nothing is left for the rest."""
    ours = logits(2, 6).float().requires_grad_()
    theirs = logits(2, 6, seed=1).float()
    theirs[:, 3] = -torch.inf
    counted = torch.ones(2, dtype=torch.bool)
    sure = Sparse(torch.tensor([[1], [2]]), torch.zeros(2, 1), torch.full((2,), -torch.inf))
    for said in (Whole(theirs), most_likely(Whole(theirs), 5), sure):
        for kind in KINDS:
            value = divergence(ours, said, counted, 1.0, kind)  # pyright: ignore[reportArgumentType]
            (gradient,) = torch.autograd.grad(value, ours)
            assert value.isfinite() and value > 0 and gradient.isfinite().all()


def test_fewer_of_a_sparse_teacher() -> None:
    theirs = logits(seed=1)
    a, b = most_likely(most_likely(Whole(theirs), 9), 4), most_likely(Whole(theirs), 4)
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.log_p, b.log_p)
    torch.testing.assert_close(a.rest, b.rest)


@pytest.mark.parametrize("wide", [19, 27])
def test_the_likeliest_tokens_of_a_wider_table_are_tokens_of_the_student(wide: int) -> None:
    """A teacher's table is padded to another length, and its logits there are what they happen to be."""
    options = SignalSection.model_validate({"kind": "logits", "top_k": 19, "on": "all"})
    ours, theirs = logits(), logits(seed=1, vocabulary=wide)
    theirs[:, 19:] += 50
    counted, tokens = torch.ones(7, dtype=torch.bool), torch.zeros(7, dtype=torch.int64)
    got = compared(options, ours, tokens, counted, Whole(theirs))
    assert float(got) == pytest.approx(float(divergence(ours, Whole(theirs[:, :19]), counted)), rel=1e-5)
