"""Noise on the embeddings: of the size it says, in training alone, and the same after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbit_ft.train.neftune import EmbeddingNoise
from lowbit_ft.train.setup import TrainError
from tests.signals.common import go, lesson, student
from tests.signals.test_training import lines, stop_at, trained
from tests.toy import Toy


def run(folder: Path, kind: str = "labels", **changes: Any) -> dict[str, torch.Tensor]:
    model = student(start=3 if changes.get("resume") else 0)
    go(folder, model, lesson(kind, model), neftune_alpha=5.0, **changes)
    assert not model.get_input_embeddings()._forward_hooks
    return trained(model)


def test_the_size_and_where_it_is_drawn_from() -> None:
    model = student()
    embeddings, ids = model.get_input_embeddings(), torch.arange(24).view(2, 12)
    clean = embeddings(ids)
    noise = EmbeddingNoise(model, 5.0, seed=1, rank=0)
    bound = 5.0 / (12 * clean.shape[-1]) ** 0.5
    model.train()

    def drawn(step: int, micro: int) -> torch.Tensor:
        noise.at(step, micro)
        return embeddings(ids) - clean

    first = drawn(0, 0)
    assert 0.95 * bound < float(first.abs().max()) <= 1.001 * bound and abs(float(first.mean())) < bound / 20
    assert torch.equal(drawn(0, 0), first)
    assert not any(torch.equal(first, other) for other in (drawn(1, 0), drawn(0, 1)))
    model.eval()
    assert torch.equal(embeddings(ids), clean)
    noise.remove()
    model.train()
    assert torch.equal(embeddings(ids), clean)


@pytest.mark.parametrize("kind", ["labels", "dpo"])
def test_a_resumed_run_draws_the_same_and_nothing_else_sees_it(kind: str, tmp_path: Path) -> None:
    """The validation losses of a run that hardly moves are those without noise, and so is the reference: at
    the first step a pair's rewards differ by the noise of the student alone."""
    straight = run(tmp_path / "a", kind)
    run(tmp_path / "b", kind, on_step=stop_at(1))
    resumed = run(tmp_path / "b", kind, resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    run(tmp_path / "still", kind, learning_rate=1e-12)
    model = student()
    go(tmp_path / "plain", model, lesson(kind, model), learning_rate=1e-12)
    still, plain = (lines(tmp_path / name, "valid_loss") for name in ("still", "plain"))
    assert still == pytest.approx(plain, rel=1e-6)
    apart = [abs(a - b) for a, b in zip(lines(tmp_path / "still"), lines(tmp_path / "plain"), strict=True)]
    assert min(apart) > 1e-6


def test_another_size_is_refused_on_resume(tmp_path: Path) -> None:
    run(tmp_path, on_step=stop_at(1))
    model = student()
    with pytest.raises(TrainError, match="neftune_alpha was 5.0 and is 6.0"):
        go(tmp_path, model, lesson("labels", model), neftune_alpha=6.0, resume=True)


def test_a_model_without_embeddings_is_refused() -> None:
    model: nn.Module = Toy()
    with pytest.raises(TrainError, match="Toy does not say which of its modules are the embeddings"):
        EmbeddingNoise(model, 5.0, 0, 0)
