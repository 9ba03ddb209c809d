"""The full-precision model is asked once, and by whoever has the same question not again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft.data.batches import Batches
from lowbit_ft.files.errors import FileError
from lowbit_ft.files.lock import FolderLock
from lowbit_ft.model.load import load_model
from lowbit_ft.pipeline import train
from lowbit_ft.session import start
from lowbit_ft.signals.cached import looked_at
from lowbit_ft.signals.shards import OtherKey
from lowbit_ft.signals.store import condense
from lowbit_ft.stages import answers
from lowbit_ft.stages.data import read_data
from lowbit_ft.stages.quantize import quantize_stage
from tests.line_tools import recipe

pytestmark = pytest.mark.usefixtures("in_the_repository")

SHORT = ["quant.residual_bits=0", "eval.generate=[]", "data.valid=null", "train.eval_every=null"]
CACHED = [*SHORT, "train.signal.kind=logits", "train.teacher=cached"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def trained(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows per forward and per walk, so that a run has several shards."""
    monkeypatch.setattr(answers, "windows_per_forward", lambda _: 2)
    monkeypatch.setattr(answers, "WALK_BYTES", 1)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the model is asked again")


@pytest.mark.parametrize(
    "signal", ["top_k: 5", "top_k: 4096, on: all", "top_k: 20, temperature: 2.0, on: all"]
)
def test_it_says_what_the_dense_model_says(signal: str, tmp_path: Path, monkeypatch: Any) -> None:
    """At every position that is looked at, of every window the run sees and of no other."""
    few_at_a_time(monkeypatch)
    made = recipe(tmp_path / "run", *CACHED, f"train.signal={{kind: logits, {signal}}}")
    with start(made) as session:
        examples = read_data(session)
        store = answers.kept_answers(session, quantize_stage(session), examples)
        dense = load_model(session.checkpoint, "sdpa", "cpu", torch.float32).eval()
    options = made.train.signal
    seen = Batches(examples, 2, 0, 0).first(made.train.max_steps * 2)
    assert store.numbers == seen and 1 < len(seen) == 6 < len(examples) and store.shards == 3
    taught = list(Batches(examples, 1, 0, shuffle=False, taught=True).one_epoch())
    for number in seen:
        batch = taught[number]
        ends = [i for i, p in enumerate(batch["position_ids"][0].tolist()) if p == 0] + [
            batch["labels"].numel()
        ]
        logits = [  # each segment alone
            dense(input_ids=batch["input_ids"][:, a:b], use_cache=False).logits[0]
            for a, b in zip(ends, ends[1:], strict=False)
        ]
        looked = looked_at(batch, options.on)[0]
        assert int(looked.sum()) == (
            len(looked) - len(ends) + 1 if options.on == "all" else int((batch["labels"] != -100).sum())
        )
        wanted, found = condense(torch.cat(logits)[looked].detach(), options.top_k, options.temperature), None
        found = store.lookup([number])
        same = wanted[0] == found.ids  # of two tokens as likely at the border either may be there
        assert same.double().mean() > 0.99
        assert ((wanted[1] - found.log_p).abs() * same).max() < 0.02
        assert (wanted[2].float().exp() - found.rest.exp()).abs().max() < 1e-3
    assert store.lookup(seen).ids.shape[1] == options.top_k


def test_a_killed_asking_goes_on_and_another_run_reads_it(tmp_path: Path, monkeypatch: Any) -> None:
    few_at_a_time(monkeypatch)
    shared = tmp_path / "answers"
    whole = train(recipe(tmp_path / "own", *CACHED, "train.learning_rate=0.01")).parent
    assert len(contents(whole / "teacher")) == 4 and not shared.exists()

    real, walks = answers.Reference, 0

    def dies(*args: Any, **options: Any) -> Any:
        nonlocal walks
        walks += 1
        if walks == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    first = recipe(tmp_path / "first", *CACHED, f"train.teacher_dir={shared}", "train.learning_rate=0.01")
    monkeypatch.setattr(answers, "Reference", dies)
    with pytest.raises(KeyboardInterrupt):
        train(first)
    assert len(contents(shared)) == 2
    train(first)  # two more walks, of the shards that are not there
    assert walks == 4 and contents(shared) == contents(whole / "teacher")
    assert trained(tmp_path / "first") == trained(whole)

    monkeypatch.setattr(answers, "Reference", never)
    other = recipe(tmp_path / "other", *CACHED, f"train.teacher_dir={shared}", "train.learning_rate=0.02")
    train(other)
    assert trained(tmp_path / "other") != trained(whole)
    assert not (tmp_path / "other" / "teacher").exists()

    again = [*CACHED, f"train.teacher_dir={shared}"]
    with pytest.raises(OtherKey, match=r"on \"targets\", and this run has \"all\""):
        train(recipe(tmp_path / "all", *again, "train.signal.on=all"))
    with pytest.raises(OtherKey, match=r'windows "[0-9a-f]+\.\.\., and this run has'):
        train(recipe(tmp_path / "seed", *again, "train.seed=1"))
    file = shared / "windows-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(FileError, match="windows-00001.safetensors: its content is not the one"):
        train(recipe(tmp_path / "damaged", *again))
    monkeypatch.undo()
    file.unlink()
    lock = FolderLock(shared)
    few_at_a_time(monkeypatch)
    with pytest.raises(FileError, match="another process is writing to this folder"):
        train(recipe(tmp_path / "second", *again))
    lock.release()
    train(recipe(tmp_path / "second", *again))
    assert contents(shared) == contents(whole / "teacher")


def test_the_folder_of_a_run_is_asked_anew_for_another_question(tmp_path: Path, capsys: Any) -> None:
    """As a base is packed anew, as long as nothing is trained."""
    for k in (4, 8):
        with start(recipe(tmp_path / "run", *CACHED, f"train.signal.top_k={k}")) as session:
            store = answers.kept_answers(session, quantize_stage(session), read_data(session))
        assert store.k == k and not store.missing()
    assert "teacher is of another recipe; asking again" in capsys.readouterr().out.replace("\n", " ")
