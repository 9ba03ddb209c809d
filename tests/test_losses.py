"""The token loss against F.cross_entropy, value and gradient, masks and chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lowbit_ft import losses
from lowbit_ft.losses import count_targets, next_token_loss


def reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")


def data(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(3, 7, 11, generator=g) * 5).to(dtype)
    labels = torch.randint(0, 11, (3, 7), generator=g)
    labels[torch.rand(3, 7, generator=g) < 0.4] = -100
    return logits, labels


@pytest.mark.parametrize("chunk", [1, 30, 1 << 22])
def test_value_and_gradient(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "FLOATS_AT_A_TIME", chunk)
    logits, labels = data(torch.float64)
    exact = logits.clone().requires_grad_()
    reference(exact, labels).mul(0.7).backward()
    ours = logits.float().requires_grad_()
    loss = next_token_loss(ours, labels)
    loss.mul(0.7).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference(exact, labels), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_bf16_logits_are_summed_in_float32() -> None:
    logits, labels = data(torch.bfloat16)
    exact = logits.double().requires_grad_()
    reference(exact, labels).backward()
    ours = logits.clone().requires_grad_()
    loss = next_token_loss(ours, labels)
    loss.backward()
    torch.testing.assert_close(loss.double(), reference(exact, labels), rtol=1e-6, atol=0)
    assert ours.grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-2, atol=1e-3)


def test_counts_and_masks() -> None:
    logits, labels = data(torch.float32)
    assert count_targets(labels) == int((labels[:, 1:] != -100).sum()) > 0
    nothing = torch.full_like(labels, -100)
    nothing[:, 0] = 5  # a first token has nothing before it: no target
    ours = logits.requires_grad_()
    loss = next_token_loss(ours, nothing)
    loss.backward()
    assert count_targets(nothing) == 0 and loss == 0 and not ours.grad.any()


def test_only_logits_and_one_number_per_row_are_kept() -> None:
    logits, labels = data(torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        next_token_loss(logits.requires_grad_(), labels)
    assert {(tuple(t.shape), t.dtype) for t in kept} == {
        ((21, 11), torch.bfloat16),
        ((21,), torch.int64),
        ((21,), torch.float32),
    }
