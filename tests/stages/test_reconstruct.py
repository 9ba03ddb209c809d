"""The stage: a run that is killed goes on by layer, a damaged or foreign layer is made again, and with no
step of training the line is a post-training quantizer.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lowbit_ft import pipeline
from lowbit_ft.export.folder import check_files
from lowbit_ft.stages import reconstruct as stage
from tests.forks import run_together
from tests.line_tools import QUICK, recipe

pytestmark = pytest.mark.usefixtures("in_the_repository")

FIT = "train.reconstruct={steps: 3, samples: 4, sequence_len: 32, micro_batch_size: 2}"
SHORT = ("eval.kl=false", "eval.generate=[]", "eval.windows=1", "data.train.limit=40", "data.valid.limit=4")
PTQ = (FIT, "train.max_steps=0", "train.eval_every=null", "quant.bits=2", "quant.group_size=64", *SHORT)


def shas(out: Path) -> dict[str, str]:
    files = sorted(out.glob("[am]*/*.safetensors"))
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def fits(out: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k != "seconds"}
        for row in json.loads((out / "reconstruct.json").read_text())
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run left alone."""
    with pytest.MonkeyPatch.context() as m:
        m.chdir(Path(__file__).parents[2])
        out = tmp_path_factory.mktemp("whole") / "run"
        pipeline.run(recipe(out, *PTQ))
    return out


def test_without_a_step_of_training_it_is_a_quantizer(whole: Path) -> None:
    check_files(whole / "merged")
    check_files(whole / "exported")
    rows = {row["stage"]: row for row in json.loads((whole / "evaluation.json").read_text())["rows"]}
    assert rows["exported"]["loss"] == rows["merged"]["loss"] == rows["trained"]["loss"]
    assert rows["trained"]["loss"] != rows["quantized"]["loss"]
    assert not (whole / "checkpoints").exists() and not (whole / "metrics.jsonl").exists()
    assert [row["trained"] > 0 and row["after"] <= row["before"] for row in fits(whole)] == [True] * 4
    names = [s["stage"] for s in json.loads((whole / "stages.json").read_text())]
    assert names == ["quantize", "reconstruct", "merge", "export", "evaluate"]
    page = (whole / "report.html").read_text()
    assert "loss before" in page and f"{fits(whole)[3]['after']:.5f}" in page


@pytest.mark.parametrize("layer", [0, 2])
def test_a_killed_run_goes_on_by_layer(
    layer: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, write = tmp_path / "run", stage.Kept.write

    def killed(self: Any, index: int, *rest: Any) -> None:
        if index == layer:
            raise KeyboardInterrupt
        write(self, index, *rest)

    monkeypatch.setattr(stage.Kept, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe(out, *PTQ))
    assert len(list(out.glob("reconstruct/layer-*"))) == layer
    monkeypatch.setattr(stage.Kept, "write", write)
    capsys.readouterr()
    pipeline.run(recipe(out, *PTQ))
    said = capsys.readouterr().out
    assert f"reconstruct: layer {layer + 1} of 4  loss" in said and "s left" in said
    assert f"reconstruct: layer {layer} of 4" not in said
    assert (f"{layer} of 4 layers are there already" in said) == (layer > 0)
    assert shas(out) == shas(whole) and len(shas(out)) >= 2 and fits(out) == fits(whole)


def test_a_damaged_layer_and_all_after_it_are_made_again(whole: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    pipeline.train(recipe(out, *PTQ))
    wanted, rows = shas(out), fits(out)
    file = out / "reconstruct" / "layer-00001" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    (out / "reconstruct" / "layer-00002" / "notes.txt").write_text("mine")
    capsys.readouterr()
    pipeline.train(recipe(out, *PTQ))
    said = capsys.readouterr().out
    assert "1 of 4 layers are there already" in said and "layer 2 of 4" in said
    assert shas(out) == wanted and fits(out) == rows
    kept = out / "reconstruct" / "layer-00002.other" / "notes.txt"
    assert kept.read_text() == "mine", "somebody's file was deleted"


@pytest.mark.slow
def test_two_processes_ship_the_bytes_of_one(whole: Path, tmp_path: Path) -> None:
    """The main process fits, the other one reads what it wrote; both then agree on what is trained."""
    out = tmp_path / "run"
    ran = run_together(
        "-m", "lowbit_ft", "train", "recipes/quickstart.yaml", *QUICK, f"output={out}", *PTQ, timeout=500
    )
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said
    assert said.count("reconstruct: layer 4 of 4") == 1
    alone = {name: sha for name, sha in shas(whole).items() if not name.startswith("exported")}
    assert shas(out) == alone


def test_training_goes_on_from_what_was_fitted(tmp_path: Path) -> None:
    """Fitted adapters are the start of training; another reconstruct section is another run."""
    out = tmp_path / "run"
    steps = ("train.max_steps=2", "train.eval_every=null", "quant.bits=2", *SHORT)
    pipeline.train(recipe(out, FIT, *steps))
    pipeline.train(recipe(tmp_path / "plain", *steps))
    losses = [
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for folder in (out, tmp_path / "plain")
    ]
    assert losses[0] < losses[1]
    before = shas(out)
    pipeline.train(recipe(out, FIT, *steps))  # nothing is left to do
    assert shas(out) == before
