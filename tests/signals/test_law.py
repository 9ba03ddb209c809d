"""The law of signals, over the table: `labels` is the token loss, bit for bit; a student that equals its
teacher has nothing to learn from it; and each part counts the positions it says, no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowbit_ft.data.batches import collate
from lowbit_ft.model import heads
from lowbit_ft.model.attention import segment_inputs
from lowbit_ft.signals import SIGNALS, Lesson
from lowbit_ft.signals.base import Part
from lowbit_ft.train import goal
from lowbit_ft.train.losses import (
    LABELS,
    Targets,
    chunked_head,
    everywhere,
    loss_forward,
    next_token_loss,
    part_counts,
)
from tests.signals.common import ASKING, CPU, OPTIONS, VOCABULARY, Mirror, options, student, windows


def batch_of() -> dict[str, torch.Tensor]:
    return collate(list(windows(4)), 0, taught=True)


def sums_and_gradients(
    model: Any, lesson: Lesson, batch: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The parts' sums, and the gradients of their weighted sum, through the forward that trains."""
    head = chunked_head(model)
    assert (head.head is None) == (heads.SMALL_VOCABULARY > 0)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    every = everywhere(batch) if lesson.signal.asks else None
    with goal.NEXT_TOKENS.attention(model, lesson), lesson.signal.begin(lesson, model, head):
        lesson.at(0, 1, 0)
        inputs |= segment_inputs(model, batch["position_ids"])
        forward = loss_forward(model, "chunked", lesson, head)
        sums = forward(model, **inputs, labels=Targets(batch["labels"], CPU, every, batch))
        (sums * torch.tensor(lesson.weights)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return sums.detach(), grads


@pytest.fixture(params=[True, False], ids=["chunks", "whole"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the head is taken off and the loss runs in chunks (of six positions, of three with a
    teacher)."""
    if request.param:
        monkeypatch.setattr(heads, "LOGITS_AT_A_TIME", VOCABULARY * 6)
        monkeypatch.setattr(heads, "SMALL_VOCABULARY", 0)
    return request.param


def test_the_table_has_members_with_parts_and_an_option_each() -> None:
    assert SIGNALS and set(OPTIONS) == set(SIGNALS) and ASKING
    for name, signal in SIGNALS.items():
        parts = signal.parts(options(name, **OPTIONS[name]))
        assert parts and all(isinstance(part, Part) for part in parts.values())
        weights = [part.weight for part in parts.values() if not part.told]
        assert min(weights) > 0 and not any(part.weight for part in parts.values() if part.told)
        assert signal.pairs or sum(weights) == pytest.approx(1), name
        assert set(OPTIONS[name]) <= signal.keys


def test_labels_are_the_token_loss(chunks: bool) -> None:
    model, batch = student(), batch_of()
    sums, grads = sums_and_gradients(model, LABELS, batch)
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    want = next_token_loss(logits, batch["labels"])
    want.backward()
    torch.testing.assert_close(sums[0], want, rtol=1e-6, atol=0)
    assert chunks or torch.equal(sums[0], want)
    assert grads
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ASKING)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn_of_it(kind: str, chunks: bool) -> None:
    """Whole logits, as the teacher gives them; what is left of the gradient is that of the labels."""
    model, batch = student(), batch_of()
    changes = {k: v for k, v in OPTIONS[kind].items() if k != "top_k"}
    section = options(kind, **changes)
    lesson = Lesson(SIGNALS[kind], section, Mirror(model))
    sums, grads = sums_and_gradients(model, lesson, batch)
    parts = dict(zip(lesson.parts, sums, strict=True))
    assert all(parts[name] == 0 for name in parts if name != "labels") and "logits" in parts
    weight = lesson.parts["labels"].weight if "labels" in parts else 0.0
    _, labels = sums_and_gradients(model, LABELS, batch)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, weight * labels[name], rtol=1e-5, atol=1e-7)
    assert grads and any(g.any() for g in labels.values())


@pytest.mark.parametrize("kind", SIGNALS)
def test_a_part_counts_what_it_says(kind: str) -> None:
    """Neither across the end of a segment, nor padding: counted one by one."""
    batch, section = batch_of(), options(kind, **OPTIONS[kind])
    signal = SIGNALS[kind]
    lesson = Lesson(signal, section, Mirror() if signal.asks or signal.refers else None)
    targets = every = chosen = 0
    for example in windows(4):
        starts = {0, example.segments[0]}
        for i in range(1, len(example.input_ids)):
            every += i not in starts
            chosen += 0 < i < example.segments[0]
            targets += example.labels[i] != -100
    assert 0 < targets < every < batch["input_ids"].numel()
    counts = {"targets": targets, "all": every, "pairs": 4, "chosen": chosen}
    want = [counts[part.on] for part in lesson.parts.values()]
    assert part_counts(lesson, batch).tolist() == want


@pytest.mark.parametrize("kind", [kind for kind in ASKING if not SIGNALS[kind].of_layers])
@pytest.mark.parametrize("on", ["all", "targets"])
def test_no_other_position_is_looked_at(kind: str, on: Any, chunks: bool) -> None:
    """A teacher that is somebody else at every position that is not counted changes nothing."""

    class Liar(Mirror):
        def __init__(self, wrong: torch.Tensor) -> None:
            super().__init__(model)
            self.wrong = wrong.reshape(-1)

        def answers(self, ask: Any) -> Any:
            honest = super().answers(ask)

            def answer(positions: torch.Tensor) -> Any:
                said = honest(positions)
                shift = self.wrong[positions, None] * torch.arange(said.logits.shape[-1])
                return type(said)(said.logits + shift)

            return answer

    model, batch = student(), batch_of()
    inside = everywhere(batch)
    targets = torch.zeros_like(inside)
    targets[:, :-1] = batch["labels"][:, 1:] != -100
    counted = inside if on == "all" else targets
    lesson = Lesson(SIGNALS[kind], options(kind, on=on), Liar(~counted))
    sums, _ = sums_and_gradients(model, lesson, batch)
    assert dict(zip(lesson.parts, sums, strict=True))["logits"] == 0
    lesson = Lesson(SIGNALS[kind], options(kind, on=on), Liar(counted))  # and this one is seen
    sums, _ = sums_and_gradients(model, lesson, batch)
    assert dict(zip(lesson.parts, sums, strict=True))["logits"] > 1
