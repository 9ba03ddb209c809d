"""The export stage: what fails verification does not stay."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowbit_ft.evaluate.perplexity import EvalRow
from lowbit_ft.export import EXPORTERS, base
from lowbit_ft.export.card import model_card, serve_line
from lowbit_ft.export.writer import write_model
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.rotations import FoldedCheckpoint, Rotation
from lowbit_ft.rundir import RunDir
from lowbit_ft.stages import evaluate
from lowbit_ft.stages import export as stage
from lowbit_ft.stages.card import card_facts
from tests.line_tools import ROOT, recipe
from tests.packed_tools import int_grid, random_weights

pytestmark = pytest.mark.usefixtures("in_the_repository")


def test_an_export_that_fails_verification_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Checkpoint.open(ROOT / "recipes" / "assets" / "tiny-llama")
    write_model(
        tmp_path / "merged",
        checkpoint,
        random_weights(checkpoint.empty_model(), int_grid()),
        EXPORTERS["native"],
    )
    RunDir(tmp_path).made("merged")
    (tmp_path / "recipe.yaml").write_text(recipe(tmp_path / "no").to_yaml())
    session: Any = SimpleNamespace(
        run=RunDir(tmp_path),
        checkpoint=checkpoint,
        folded=checkpoint,
        as_shipped=checkpoint,
        recipe=recipe(tmp_path / "no"),
        device=torch.device("cpu"),
        say=print,
    )
    monkeypatch.setattr(stage, "check_export", lambda session, folder: None)
    folder = stage.export_stage(session, "compressed-tensors")
    stage.export_stage(session, "compressed-tensors")
    assert capsys.readouterr().err == ""
    stage.export_stage(session, "gptq")
    said = capsys.readouterr().err
    assert said.startswith(f"note: {folder}: the compressed-tensors export that is here will be replaced")

    def fails(session: Any, folder: Path) -> None:
        raise ValueError("1 of 14 layers differ")

    monkeypatch.setattr(stage, "check_export", fails)
    for _ in range(2):  # the second one replaces what the first has set aside
        with pytest.raises(
            ValueError, match=r"(?s)1 of 14 layers differ.*was not verified.*exported\.refused"
        ):
            stage.export_stage(session, "gptq")
        assert not folder.exists() and (tmp_path / "exported.refused" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="1 of 14 layers differ$"):
        stage.export_stage(session, "native")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_an_export_that_nothing_here_reads_has_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With export.verify: false a run may end in such a format; its table was the step that refused it."""
    monkeypatch.setattr(base, "find_spec", lambda name: None if name == "gptqmodel" else True)
    (tmp_path / "exported").mkdir()
    monkeypatch.setattr(evaluate, "read_manifest", lambda folder: {"format": "gptq"})
    monkeypatch.setattr(evaluate, "stage_model", lambda session, stage: stage)
    written, said = [], []
    monkeypatch.setattr(evaluate, "replace_file", lambda folder, name, text: written.append(folder.name))
    monkeypatch.setattr(evaluate, "card", lambda session, format: {"README.md": format})
    session: Any = SimpleNamespace(
        run=RunDir(tmp_path), device=torch.device("cpu"), say=said.append, recipe=recipe(tmp_path / "no")
    )
    measure: Any = SimpleNamespace(
        row=lambda model, stage: EvalRow(stage, 1.0, None, None, 4), count=1, files=dict
    )
    rows = evaluate.measure_shipped(session, evaluate.Measured(measure=measure))
    assert [row.stage for row in rows] == ["merged"] and written == ["merged", "exported"]
    assert any(
        "not evaluated: exported; reading gptq needs gptqmodel, not installed" in line for line in said
    )


def test_the_serve_line_and_the_card_say_which_keys_are_turned(tmp_path: Path) -> None:
    """R3 is in rotation.json and not in the recipe: kind adaptive chooses the layers."""
    cached = recipe(
        tmp_path,
        "quant.kv_cache={bits: 8, kind: token_head}",
        "quant.rotation={kind: adaptive, sites: {r3: true}}",
        "quant.calibrate=mse",
        "export.format=native",
    )
    checkpoint = Checkpoint.open(ROOT / "recipes" / "assets" / "tiny-llama")
    layers = checkpoint.config.num_hidden_layers
    folded = FoldedCheckpoint(checkpoint, Rotation(0, r3=(True, *(False,) * (layers - 1))))
    session: Any = SimpleNamespace(folded=folded, checkpoint=checkpoint)
    line = serve_line(card_facts(session, cached), "native", tmp_path)
    assert "R3 in 1 layers; the folder says so, and its reader does it" in line
    assert "R3 in 1 layers" in model_card(card_facts(session, cached), "native", [])
    elsewhere = serve_line(card_facts(session, cached), "compressed-tensors", tmp_path)
    assert "R3 in 1 layers, which this server has no flag for" in elsewhere
    session.folded = checkpoint
    assert "R3" not in serve_line(card_facts(session, cached), "native", tmp_path)
