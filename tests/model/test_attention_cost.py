"""Packed windows cost what their segments cost: nothing is L x L, and the step asks the device nothing."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft.data.batches import collate
from lowbit_ft.data.windows import Example
from lowbit_ft.evaluate.perplexity import Reference, evaluate
from lowbit_ft.model import attention
from lowbit_ft.model.attention import segment_attention, segment_inputs
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from lowbit_ft.train.losses import ChunkedHead, Targets, count_targets, loss_forward
from tests.model.attention_models import CPU, Largest, examples, model_of
from tests.packed_tools import tiny_checkpoint


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2, one layer in a window", "gemma3", "gemma2, capped", "gpt_oss, sinks"],
)
@pytest.mark.parametrize("lengths", [[300, 212], [512]])
def test_nothing_is_length_x_length(family: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WINDOW_TILE", 32)
    monkeypatch.setattr(attention, "SCORES_AT_A_TIME", 1 << 14)
    size = sum(lengths)
    model, ids = model_of(family), [k % 96 + 1 for k in range(size)]
    batch = collate([Example(ids, ids, lengths)], 0)
    labels = Targets(batch.pop("labels"), CPU)
    found = []
    for way in (segment_attention(model), nullcontext()):
        with way, Largest() as largest:
            loss_forward(model)(
                model, labels=labels, **batch, **segment_inputs(model, batch["position_ids"])
            ).backward()
        found.append(largest.elements)
    assert found[0] <= size * 97, found  # the logits of this tiny batch
    if family not in ("llama", "gemma3") or len(lengths) > 1:  # what transformers does: a mask, or scores
        assert found[1] >= size * size, found


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2, capped"])
def test_the_step_asks_the_device_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors have no values: whatever would make the host wait for a number raises."""
    monkeypatch.setattr(attention, "WINDOW_TILE", 1)
    meta = torch.device("meta")
    model = model_of(family).to(meta)
    head = ChunkedHead(model.model, model.forward, 97)
    head.rows = 5
    batch = collate(examples(), 0)

    def step() -> None:
        labels = Targets(batch["labels"], meta)
        inputs = {k: v.to(meta) for k, v in batch.items() if k != "labels"}
        head.loss(
            model.model(**inputs, use_cache=False, **segment_inputs(model, batch["position_ids"])), labels
        ).backward()

    with pytest.raises(RuntimeError, match="item|meta"):  # transformers looks on the device for restarts
        step()
    attention.switch(model.get_decoder())
    step()
    assert all(p.grad is not None for p in model.parameters())


def test_stages_are_measured_without_masks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path), dtype="float32")
    model, batch = load_model(checkpoint), collate(examples(), 0)
    batch = {k: v % 64 if k == "input_ids" else v for k, v in batch.items()}
    batch["labels"] = torch.where(batch["labels"] < 0, -100, batch["input_ids"])
    options: dict[str, Any] = {"attention": "sdpa", "device": CPU, "dtype": torch.float32}
    reference = Reference(checkpoint, [batch], segments=True, **options)
    row = evaluate(model, [batch], "base", reference)
    assert row.kl == 0 and row.loss == reference.row().loss and row.tokens == count_targets(batch["labels"])
    monkeypatch.setattr(attention, "why_not", lambda _: "a test")
    masked = evaluate(model, [batch], "base", Reference(checkpoint, [batch], **options))
    assert masked.kl == 0 and row.loss == pytest.approx(masked.loss, rel=1e-6)
    joined = {**batch, "position_ids": torch.arange(15).repeat(2, 1)}
    assert abs(evaluate(model, [joined], "base").loss - masked.loss) > 1e-4
