"""A teacher is made, measured once, and judged, before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lowbit_ft import pipeline
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.signals.checkpoint import unlike
from lowbit_ft.signals.residual import Residual
from lowbit_ft.stages import teacher as stage
from tests.line_tools import ROOT, recipe

pytestmark = pytest.mark.usefixtures("in_the_repository")
TINY = ROOT / "recipes" / "assets" / "tiny-llama"
SHORT = (
    "train.max_steps=2",
    "train.micro_batch_size=1",
    "train.gradient_accumulation_steps=1",
    "data.sequence_len=64",
    "quant.targets=['*.layers.0.*']",
    "quant.bits=3",
    "train.signal={kind: mix, on: all, temperature: 2}",
)


def other_tokens(folder: Path) -> Path:
    """The tiny Llama with two tokens of its tokenizer exchanged."""
    shutil.copytree(TINY, folder)
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(values))
    return folder


def test_a_teacher_of_other_tokens_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    other = other_tokens(tmp_path / "other")
    assert unlike(TINY, TINY) is None
    reason = unlike(other, TINY)
    assert reason and "2 differ" in reason
    with pytest.raises(RecipeError, match="train.teacher: got .*its tokens are others.*2 differ"):
        recipe(tmp_path / "run", *SHORT, f"train.teacher={other}")
    config = json.loads((other / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "awq"}
    }
    (other / "config.json").write_text(json.dumps(config))
    assert "quantized already" in str(unlike(other, TINY))


def test_what_can_be_known_is_refused_before_the_base_is_packed(tmp_path: Path) -> None:
    """A hub id that is none, and a shared folder with the answers to another question."""
    given = tmp_path / "answers"
    asked = (*SHORT, "train.teacher=cached", f"train.teacher_dir={given}")
    pipeline.train(recipe(tmp_path / "first", *asked))
    for changes, words in (
        (
            (*asked, "train.signal.temperature=3"),
            "holds teacher's words about something else: temperature",
        ),
        (
            (*SHORT, "train.teacher=no-such-model"),
            "train.teacher: no-such-model: no such folder.*residual, cached",
        ),
    ):
        made = recipe(tmp_path / "second", *changes)
        with pytest.raises(ValueError, match=words):
            pipeline.train(made)
        assert not (made.output / "base").exists()


@pytest.mark.parametrize("name", ["residual", str(TINY)], ids=["residual", "checkpoint"])
def test_the_line_with_a_teacher(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured on every token of the first windows, said, written, and not measured again by a run that goes
    on."""
    made = recipe(tmp_path / "run", *SHORT, f"train.teacher={name}")
    pipeline.train(made)
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "teacher.json").read_text())
    assert 0 < 4 * found["kl"] < found["student_kl"] and found["windows"] == stage.WINDOWS
    assert found["tokens"] > 8 * 40
    assert f"teacher {name}: KL to full precision {found['kl']:.6f}" in said
    assert "(labels " in said and ", logits " in said
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["loss"] == pytest.approx((row["labels_loss"] + row["logits_loss"]) / 2)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    monkeypatch.setattr(stage, "Reference", None)
    pipeline.train(made)
    assert json.loads((tmp_path / "run" / "teacher.json").read_text()) == found


def test_a_teacher_that_is_hardly_nearer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by asking for more than there is; benchmarks/teachers.py has what gptq's residual is."""
    monkeypatch.setattr(Residual, "nearest", 1e6)
    made = recipe(tmp_path / "run", *SHORT, "train.teacher=residual")
    with pytest.raises(
        ValueError, match=r"must be 1e\+06 times nearer.*set train.teacher: cached.*calibrate"
    ):
        pipeline.train(made)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_teachers_files_tell_it_from_another(tmp_path: Path) -> None:
    """Another model of the same tokens in the same folder is another teacher: facts hold its fingerprint."""
    from types import SimpleNamespace

    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    facts: list[dict[str, Any]] = []
    for _ in range(2):
        made = recipe(tmp_path / "run", *SHORT, f"train.teacher={folder}")
        session: Any = SimpleNamespace(
            recipe=made,
            checkpoint=Checkpoint.open(TINY, None, "float32"),
            device="cpu",
            dtype=None,
            say=lambda text: None,
        )
        facts.append(stage.pack_other(session, str(folder))[1])
        config = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
        (folder / "config.json").write_text(json.dumps(config))
    assert facts[0]["model"] == facts[1]["model"] and facts[0]["files"] != facts[1]["files"]
