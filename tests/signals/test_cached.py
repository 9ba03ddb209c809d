"""A teacher that was asked before: what it is compared by, and a training run on it."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.files.errors import FileError
from lowbit_ft.signals import SIGNALS, TEACHERS, Ask, Lesson, Sparse, Whole
from lowbit_ft.signals.cached import Cached, looked_at
from lowbit_ft.signals.divergence import divergence
from lowbit_ft.signals.store import Store, condense
from lowbit_ft.train.setup import TrainError
from tests.loop_tools import go, losses, stop_at
from tests.toy import VOCABULARY, Toy, equal, state

CPU = torch.device("cpu")


def random_logits(rows: int, vocabulary: int, seed: int) -> Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def reference(z: Tensor, teacher: Tensor, k: int, temperature: float, kind: str) -> Tensor:
    """In float64, from the definition: outcomes are the k likeliest tokens and one for all others."""
    p, q = (torch.softmax(t.double() / temperature, -1) for t in (teacher, z))
    ids = p.topk(k).indices
    outcomes = []
    for t in (p, q):
        top = t.gather(-1, ids)
        outcomes.append(torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1) if k < p.shape[-1] else top)
    a, b = outcomes
    forward, reverse = (a * (a.log() - b.log())).sum(), (b * (b.log() - a.log())).sum()
    return (
        temperature**2 * {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[kind]
    )


@pytest.mark.parametrize("kind", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 5, 37])
def test_against_float64(kind: Any, temperature: float, k: int, tmp_path: Path) -> None:
    """Value and gradient, through the disk. k = 37 is the whole vocabulary: then it is the whole one."""
    teacher, vocabulary = random_logits(9, 37, 1), 37
    key = {"top_k": k, "vocabulary": vocabulary}
    Store(tmp_path, key, [0], 1).write(0, [9], *condense(teacher, k, temperature))
    given = Store(tmp_path, key, [0], 1).lookup([0])
    counted = torch.ones(9, dtype=torch.bool)
    z = random_logits(9, vocabulary, 2).requires_grad_()
    found = divergence(z, given, counted, temperature, kind)
    found.backward()
    exact = z.detach().clone().double().requires_grad_()
    wanted = reference(exact, teacher, k, temperature, kind)
    wanted.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=2e-3, abs=2e-3)
    assert z.grad is not None and exact.grad is not None
    assert (z.grad - exact.grad).norm() <= 2e-3 * exact.grad.norm() + 1e-6
    if k == vocabulary:
        whole = divergence(z.detach(), Whole(teacher), counted, temperature, kind)
        assert found.item() == pytest.approx(whole.item(), rel=2e-3)


def windows(count: int = 13) -> Examples:
    """Of two segments, with targets in both; one window has none at all."""
    made = []
    for n in range(count):
        ids = [(3 * n + i * i) % VOCABULARY for i in range(6 + n % 5)]
        labels = [-100, *ids[1:3], -100, *ids[4:]]
        made.append(Example(ids, [-100] * len(ids) if n == 4 else labels, [3, len(ids) - 3]))
    return Examples(made)


def teacher_logits(ids: Tensor) -> Tensor:
    """[..., L] -> [..., L, V]: something that depends on the token alone."""
    return random_logits(VOCABULARY, VOCABULARY, 5)[ids]


def store_of(folder: Path, on: str, k: int = 4, per_shard: int = 3) -> Store:
    data = windows()
    key = {"top_k": k, "vocabulary": VOCABULARY, "on": on, "temperature": 1.0}
    here = Store(folder, key, range(len(data)), per_shard)
    for shard in here.missing():
        rows, parts = [], [condense(torch.empty(0, VOCABULARY), k)]
        for number in here.windows(shard):
            batch = next(iter(Batches(Examples([data[number]]), 1, 0, taught=True).one_epoch()))
            looked = looked_at(batch, on)
            rows.append(int(looked.sum()))
            parts.append(condense(teacher_logits(batch["input_ids"])[looked], k))
        here.write(shard, rows, *(torch.cat(column) for column in zip(*parts, strict=True)))
    return Store(folder, key, range(len(data)), per_shard)


@pytest.mark.parametrize("on", ["targets", "all"])
def test_answers_are_those_of_the_positions_asked(on: str, tmp_path: Path) -> None:
    """Padded batches of several segments, in any order; positions in any order."""
    teacher = Cached(store_of(tmp_path, on))
    for batch in Batches(windows(), 3, 0, taught=True).one_epoch():
        answer = teacher.answers(Ask(batch, {}, CPU))
        where = looked_at(batch, on).reshape(-1).nonzero()[:, 0].flip(0)
        given = answer(where)
        ids, log_p, rest = condense(teacher_logits(batch["input_ids"]).reshape(-1, VOCABULARY)[where], 4)
        assert isinstance(given, Sparse) and torch.equal(given.ids, ids)
        assert (given.log_p - log_p.float()).abs().max() < 5e-3 and (
            given.rest - rest.float()
        ).abs().max() < 5e-3
        assert answer(torch.arange(batch["labels"].numel())).ids.shape == (batch["labels"].numel(), 4)
        inside = [2, len(batch["labels"][0]) - 1]  # the last tokens of the first row's segments
        assert not looked_at(batch, on)[0, inside].any()


def test_a_batch_without_positions_has_an_answer_that_counts_nothing(tmp_path: Path) -> None:
    teacher, data = Cached(store_of(tmp_path, "targets")), windows()
    batch = next(iter(Batches(Examples([data[4]]), 1, 0, taught=True).one_epoch()))
    batch["windows"][0] = 4
    given = teacher.answers(Ask(batch, {}, CPU))(torch.zeros(1, dtype=torch.int64))
    assert isinstance(given, Sparse) and given.ids.shape == (1, 4)
    assert float(given.log_p.exp().sum()) == pytest.approx(1.0)


def test_other_windows_are_refused_by_name(tmp_path: Path) -> None:
    teacher = Cached(store_of(tmp_path, "targets"))
    batch = next(iter(Batches(windows(), 1, 0, shuffle=False, taught=True).one_epoch()))
    batch["windows"][0] = 4
    with pytest.raises(FileError, match=r"has 0 positions of windows \[4\], where the loss looks at 4"):
        teacher.answers(Ask(batch, {}, CPU))


def lesson(folder: Path, kind: str = "logits", on: str = "all", **options: Any) -> Lesson:
    given = {"temperature": 1.0, "top_k": None, "on": on, "divergence": "forward", "label_weight": 0.5}
    signal = types.SimpleNamespace(**given | options)
    return Lesson(SIGNALS[kind], signal, Cached(store_of(folder, on)))


def data() -> Batches:
    return Batches(windows(), 2, 0, 3, taught=True)


@pytest.mark.parametrize("kind", ["logits", "mix"])
def test_a_run_resumes_bit_equal(kind: str, tmp_path: Path) -> None:
    """And learns: its divergence from the teacher falls."""
    here = tmp_path / "answers"
    whole, _ = go(tmp_path / "whole", data=data(), lesson=lesson(here, kind), max_steps=20)
    stopped = {"on_step": stop_at(7), "max_steps": 20}
    go(tmp_path / "parts", data=data(), lesson=lesson(here, kind), **stopped)
    again, result = go(
        tmp_path / "parts", Toy(start=3), data=data(), lesson=lesson(here, kind), max_steps=20, resume=True
    )
    assert result.steps == 20 and equal(state(whole), state(again))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1] < 0.95 * losses(tmp_path / "whole")[0]


def test_a_run_does_not_go_on_with_another_teacher(tmp_path: Path) -> None:
    go(tmp_path / "run", data=data(), lesson=lesson(tmp_path / "a", on="all"), on_step=stop_at(2))
    other = Lesson(
        SIGNALS["logits"],
        lesson(tmp_path / "a").options,
        Cached(store_of(tmp_path / "b", "all", k=5)),
    )
    with pytest.raises(TrainError, match="cannot resume: signal was"):
        go(tmp_path / "run", data=data(), lesson=other, resume=True)


def test_the_line_has_it() -> None:
    assert TEACHERS["cached"] is Cached
