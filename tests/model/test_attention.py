"""Packed windows: loss and gradients are those of their segments alone, for every attention a CPU has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash

from lowbit_ft.data.batches import collate
from lowbit_ft.model import attention
from lowbit_ft.model.attention import segment_attention, segment_inputs, why_not
from lowbit_ft.train.losses import Targets, loss_forward
from lowbit_ft.train.offload import MemoryStore, Offload
from lowbit_ft.train.setup import activation_checkpointing
from tests.model.attention_models import CPU, FAMILIES, examples, model_of


def gradients(model: Any, run: Callable[[], Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = run()
    loss.backward()
    return float(loss.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def alone(model: Any) -> Any:
    """The sum of the losses of every segment, each a batch of its own, with the model's own attention."""
    total = torch.zeros((), dtype=torch.float64)
    for example in examples():
        start = 0
        for length in example.segments:
            ids, labels = (
                torch.tensor(x[start : start + length])[None] for x in (example.input_ids, example.labels)
            )
            out = model(input_ids=ids, position_ids=torch.arange(length)[None], use_cache=False)
            total = total + torch.nn.functional.cross_entropy(
                out.logits[0, :-1].double(), labels[0, 1:], ignore_index=-100, reduction="sum"
            )
            start += length
    return total


def packed(model: Any, sizes: tuple[int, ...] = (2,), mask_dtype: torch.dtype | None = None) -> Any:
    """The same from packed windows, `sizes` of them per micro-batch."""
    left, total, forward = examples(), torch.zeros((), dtype=torch.float64), loss_forward(model)
    for size in sizes:
        batch, left = collate(left[:size], 0, mask_dtype=mask_dtype), left[size:]
        labels = Targets(batch.pop("labels"), CPU)
        total = total + forward(model, labels=labels, **batch, **segment_inputs(model, batch["position_ids"]))
    return total


def assert_same(a: tuple[float, dict[str, Any]], b: tuple[float, dict[str, Any]], tolerance: float) -> None:
    assert b[0] > 10 and abs(a[0] - b[0]) <= tolerance * b[0], (a[0], b[0])
    assert a[1].keys() == b[1].keys()
    most = max(float(g.abs().max()) for g in b[1].values())
    for name, grad in b[1].items():  # a bias of keys has no gradient but rounding: hence the largest of all
        error = float((a[1][name] - grad).abs().max())
        assert error <= tolerance * max(float(grad.abs().max()), 0.01 * most), (name, error)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_window_is_its_segments(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WINDOW_TILE", 1)  # tiles of 3 rows where the window is 3
    monkeypatch.setattr(attention, "SCORES_AT_A_TIME", 4 * 11 * 4)
    model = model_of(family)
    before, tolerance = (
        model.get_decoder().config._attn_implementation,
        1e-12 if FAMILIES[family][1] else 3e-6,
    )
    want = gradients(model, lambda: alone(model))
    assert why_not(model) == "" and model.training
    with segment_attention(model):
        assert model.get_decoder().config._attn_implementation == attention.NAME
        assert_same(gradients(model, lambda: packed(model)), want, tolerance)
        assert_same(gradients(model, lambda: packed(model, (1, 1))), want, tolerance)
        for offload in (None, Offload(MemoryStore())):
            activation_checkpointing(model, True, offload)
            assert_same(gradients(model, lambda: packed(model)), want, tolerance)
            activation_checkpointing(model, False)
    assert model.get_decoder().config._attn_implementation == before
    # what it replaces agrees: the masks that transformers makes, or an explicit one where it makes none
    if not family.startswith("gpt_oss"):  # whose masks know no segments, in transformers 5.23
        assert_same(
            gradients(model, lambda: packed(model, mask_dtype=model.dtype if family == "opt" else None)),
            want,
            tolerance,
        )
    # and joining the segments does not: the comparison can fail
    monkeypatch.setattr(
        attention, "segment_lengths", lambda positions: [[positions.shape[1]]] * len(positions)
    )
    with segment_attention(model):
        assert abs(gradients(model, lambda: packed(model))[0] - want[0]) > 1e-4


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "eager"), ("mistral", "eager"), ("qwen3", "eager"), ("gemma3", "eager")]
)
def test_eager_is_left_alone_and_agrees(family: str, kind: str) -> None:
    model = model_of(family, kind)
    assert why_not(model) == "its attention is eager" and segment_inputs(model, torch.arange(3)[None]) == {}
    want = gradients(model, lambda: alone(model))
    with segment_attention(model):
        assert_same(gradients(model, lambda: packed(model)), want, 3e-6)  # its softmax is float32


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int] = (-1, -1),
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """flash_attn_varlen_func by its documentation: [tokens, heads, D], lower right causal, inclusive
    windows.
    """
    assert (
        causal
        and not dropout_p
        and torch.equal(cu_seqlens_q, cu_seqlens_k)
        and cu_seqlens_q.dtype == torch.int32
    )
    ends = cu_seqlens_q.tolist()
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in zip(ends, ends[1:], strict=False)) and ends[
        -1
    ] == len(q)
    out = []
    for a, b in zip(ends, ends[1:], strict=False):
        gap = torch.arange(b - a)[:, None] - torch.arange(b - a)
        seen = (gap >= 0) & ((gap <= window_size[0]) | (window_size[0] < 0))
        parts = (t[a:b].transpose(0, 1).repeat_interleave(q.shape[1] // t.shape[1], 0) for t in (q, k, v))
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                *parts, attn_mask=seen, scale=softmax_scale
            ).transpose(0, 1)
        )
    return torch.cat(out)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2, one layer in a window"])
def test_flash_attention_is_told_the_lengths_of_every_row(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel needs a GPU. What it is given does not: here a function of its signature takes its place."""
    model = model_of(family)
    want = gradients(model, lambda: alone(model))
    process = flash._lazy_define_process_function(varlen)
    monkeypatch.setattr(
        flash, "lazy_import_flash_attention", lambda *_: ((None, varlen, None, None, None), (process, None))
    )
    model.config._attn_implementation_internal = "flash_attention_2"
    assert why_not(model) == "its attention is flash_attention_2"
    assert_same(gradients(model, lambda: packed(model)), want, 1e-12)
    # two rows with restarts, which transformers takes for one row each unless it is told
    assert attention.segment_inputs(model, torch.tensor([[0, 1, 0], [0, 1, 2]]))[
        "cu_seq_lens_q"
    ].tolist() == [0, 2, 3, 6]
