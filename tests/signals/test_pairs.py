"""Signals of pairs against their equations in plain float64 code, against trl where it is installed, and the
reference: asked in every step, or kept."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lowbit_ft.data.batches import Batches, collate
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.files.errors import FileError
from lowbit_ft.model import heads
from lowbit_ft.signals import SIGNALS, Ask, Lesson
from lowbit_ft.signals.dpo import DPO_LOSSES
from lowbit_ft.signals.reference import CachedReference, StepReference, first_tokens
from lowbit_ft.signals.sequences import SequenceStore
from lowbit_ft.signals.shards import OtherKey
from lowbit_ft.signals.tokens import sequence_numbers
from lowbit_ft.train.losses import Targets, chunked_head, loss_forward, part_counts
from lowbit_ft.train.setup import TrainError
from tests.signals.common import CPU, VOCABULARY, go, options, student, windows
from tests.signals.test_training import lines, run, stop_at, trained

BETA = 0.4


def shaken() -> Any:
    """A student that is no longer its reference."""
    model = student()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def packed_pairs() -> dict[str, Tensor]:
    """Two windows, of two pairs and of one, padded."""
    one, two, three = list(windows(3))
    ids = one.input_ids + two.input_ids
    first = Example(ids, one.labels + two.labels, one.segments + two.segments)
    return collate([first, three], 0, taught=True, numbers=[0, 1])


def said(model: Any, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of every sequence, one by one in a batch of its own: log p of its next tokens, and which are of the
    answer."""
    found = []
    for row in range(len(batch["labels"])):
        number = sequence_numbers(batch["position_ids"])[row]
        used = torch.arange(len(number)) < batch["used"][row]
        for sequence in number.unique().tolist():
            here = (number == sequence) & used
            ids, labels = batch["input_ids"][row][here], batch["labels"][row][here]
            logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
            log_p = logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
            found.append((log_p, labels[1:] != -100))
    return found


def by_hand(kind: str, loss_type: str, model: Any, batch: dict[str, Tensor]) -> Tensor:
    ours = said(model, batch)
    with torch.no_grad():
        adapters = [(layer, layer.adapter) for layer in model.modules() if getattr(layer, "adapter", None)]
        for layer, _ in adapters:
            layer.adapter = None
        base = said(model, batch)
        for layer, adapter in adapters:
            layer.adapter = adapter
    losses, nll = [], []
    for chosen in range(0, len(ours), 2):
        (a, at_a), (b, at_b) = ours[chosen : chosen + 2]
        nll.append(-a)
        if kind == "orpo":
            la, lb = a[at_a].mean(), b[at_b].mean()
            gap = (la - (1 - la.exp()).log()) - (lb - (1 - lb.exp()).log())
            losses.append(-BETA * logsigmoid(gap))
            continue
        ra = a[at_a].sum() - base[chosen][0][at_a].sum()
        rb = b[at_b].sum() - base[chosen + 1][0][at_b].sum()
        h = BETA * (ra - rb)
        losses.append(
            {
                "sigmoid": -logsigmoid(h),
                "hinge": torch.relu(1 - h),
                "ipo": (ra / at_a.sum() - rb / at_b.sum() - 1 / (2 * BETA)) ** 2,
                "robust": (-0.8 * logsigmoid(h) + 0.2 * logsigmoid(-h)) / 0.6,
            }[loss_type]
        )
    mean = torch.stack(losses).mean()
    return mean + torch.cat(nll).mean() if kind == "orpo" else mean


def lesson_of(kind: str, loss_type: str, model: Any) -> Lesson:
    keys: dict[str, Any] = {"beta": BETA}
    if kind == "dpo":
        keys |= {"loss_type": loss_type} | ({"label_smoothing": 0.2} if loss_type == "robust" else {})
    return Lesson(SIGNALS[kind], options(kind, **keys), StepReference(model) if kind == "dpo" else None)


def computed(model: Any, lesson: Lesson, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    head = chunked_head(model)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with lesson.teacher.begin(head) if lesson.teacher else nullcontext():
        forward = loss_forward(model, "chunked", lesson, head)
        labels = lesson.signal.labels(batch)
        sums = forward(model, **inputs, labels=Targets(labels, CPU, None, batch))
    means = sums / part_counts(lesson, batch).clamp_min(1)
    return (means * torch.tensor(lesson.weights)).sum(), dict(zip(lesson.parts, means.tolist(), strict=True))


@pytest.mark.parametrize("chunks", [True, False])
@pytest.mark.parametrize("kind, loss_type", [*(("dpo", name) for name in DPO_LOSSES), ("orpo", "")])
def test_the_equation(kind: str, loss_type: str, chunks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, every gradient and what is told of two windows, one of them of two pairs."""
    if chunks:
        monkeypatch.setattr(heads, "LOGITS_AT_A_TIME", VOCABULARY * 6)
        monkeypatch.setattr(heads, "SMALL_VOCABULARY", 0)
    model, batch = shaken(), packed_pairs()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    want = by_hand(kind, loss_type, model, batch)
    slopes = torch.autograd.grad(want, [dict(model.named_parameters())[n] for n in names])
    lesson = lesson_of(kind, loss_type, model)
    loss, told = computed(model, lesson, batch)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    loss.backward()
    assert any(slope.any() for slope in slopes)
    for name, slope in zip(names, slopes, strict=True):
        got = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(got, slope, rtol=1e-4, atol=1e-6)
    assert part_counts(lesson, batch)[-1] == 3
    margin = told["rewards/chosen"] - told["rewards/rejected"]
    assert told["rewards/margins"] == pytest.approx(margin, rel=1e-4) and margin != 0
    assert told["rewards/accuracies"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    sequences = said(model, batch)
    whole = [log_p[answer].mean() if kind == "orpo" else log_p[answer].sum() for log_p, answer in sequences]
    assert told["logps/rejected"] == pytest.approx(torch.stack(whole)[1::2].mean().item(), rel=1e-5)


def test_at_the_start_the_model_is_its_reference(tmp_path: Path) -> None:
    run(tmp_path, "dpo", learning_rate=1e-12)
    assert lines(tmp_path) == pytest.approx([0.6931472] * 4) == lines(tmp_path, "valid_loss") * 2
    assert lines(tmp_path, "rewards/margins") == pytest.approx([0.0] * 4, abs=1e-6)


def test_what_is_measured_is_the_loss_of_the_pairs_and_falls_where_it_is_trained(tmp_path: Path) -> None:
    model = student()
    mine = lesson_of("dpo", "sigmoid", model)
    go(tmp_path, model, mine, max_steps=16, eval_every=16, learning_rate=0.02, max_grad_norm=10.0)
    assert lines(tmp_path)[-1] < 0.9 * lines(tmp_path)[0]
    assert lines(tmp_path, "rewards/margins")[-1] > 0
    for key in ("valid_rewards/chosen", "valid_rewards/margins", "valid_logps/rejected"):
        assert len(lines(tmp_path, key)) == 1


def test_other_options_of_pairs_are_refused_on_resume(tmp_path: Path) -> None:
    run(tmp_path, "orpo", on_step=stop_at(1))
    model = student()
    with pytest.raises(TrainError, match="signal was .*'beta': 0.3.* and is .*'beta': 0.4"):
        go(tmp_path, model, lesson_of("orpo", "", model), resume=True)


def kept(folder: Path, model: Any, data: Examples, key: dict[str, Any] | None = None) -> SequenceStore:
    """A store of what the model says without its adapters, in two shards."""
    store = SequenceStore(folder, key or {"base": "here"}, list(range(len(data))), -(-len(data) // 2))
    step = StepReference(model)
    with step.begin(chunked_head(model)):
        for shard in store.missing():
            rows, found = [], []
            for number in store.windows(shard):
                batch = collate([data[number]], 0, taught=True)
                inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
                log_p = step.say(Ask(batch, inputs, CPU)).double()
                sizes = torch.bincount(sequence_numbers(batch["position_ids"]).reshape(-1)).tolist()
                found += [part.sum()[None] for part in log_p.split(sizes)]
                rows.append(len(sizes))
            store.write(shard, rows, torch.cat(found))
    return SequenceStore(folder, key or {"base": "here"}, list(range(len(data))), -(-len(data) // 2))


def test_a_reference_that_was_kept_is_the_one_that_is_asked(tmp_path: Path) -> None:
    """The same losses to rounding, and bit-equal after a stop; the base is not run in a step."""

    def cached(folder: Path, **changes: Any) -> dict[str, Tensor]:
        model = student()
        data, valid = kept(tmp_path / "train", model, windows()), kept(tmp_path / "v", model, windows(3, 1))
        mine = Lesson(SIGNALS["dpo"], options("dpo"), CachedReference(data, valid))
        go(folder, model, mine, learning_rate=0.02, **changes)
        return trained(model)

    straight = cached(tmp_path / "a")
    cached(tmp_path / "b", on_step=stop_at(1))
    resumed = cached(tmp_path / "b", resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    model = student()
    go(
        tmp_path / "step",
        model,
        Lesson(SIGNALS["dpo"], options("dpo"), StepReference(model)),
        learning_rate=0.02,
    )
    for key in ("loss", "rewards/margins", "valid_loss", "valid_rewards/chosen"):
        assert lines(tmp_path / "a", key) == lines(tmp_path / "b", key)
        assert lines(tmp_path / "a", key) == pytest.approx(lines(tmp_path / "step", key), rel=1e-4, abs=1e-5)
    assert min(map(abs, lines(tmp_path / "a", "rewards/margins")[1:])) > 1e-4


def test_what_was_kept_is_believed_only_as_it_was_written(tmp_path: Path) -> None:
    model, data = student(), windows(5)
    store = kept(tmp_path, model, data)
    assert store.lookup([4, 0]).shape == (4,) and bool((store.lookup([4, 0]) < 0).all())
    assert torch.equal(kept(tmp_path, model, data).lookup([1]), store.lookup([1])), "gone on with, not again"
    with pytest.raises(OtherKey, match='base "here", and this run has "there"'):
        kept(tmp_path, model, data, {"base": "there"})
    with pytest.raises(ValueError, match="window 9 is not in it"):
        store.lookup([9])
    (batch,) = Batches(data, 5, 0, taught=True).one_epoch()
    assert len(first_tokens(batch)) == 10
    wrong = CachedReference(store, None)
    batch["windows"] = torch.tensor([0, 1, 2, 3])
    with pytest.raises(FileError, match="has 8 answers of windows .*, where the data has 10"):
        wrong.answers(Ask(batch, {}, CPU))
    path = store.path(0)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(FileError, match="was replaced or written to"):
        store.lookup([0])


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_the_gradient_may_be_made_without_a_backward(kind: str, tmp_path: Path) -> None:
    model = student()
    gradient = {"kind": "zeroth_order"}
    result = go(
        tmp_path,
        model,
        lesson_of(kind, "sigmoid", model),
        gradient=gradient,
        learning_rate=1e-4,
        max_grad_norm=None,
    )
    assert result.steps == 4 and not result.bad_steps
