"""Which rows the stages look at, and what is said of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from lowbit_ft.data import examples as data
from lowbit_ft.session import start
from lowbit_ft.stages.data import calibration_batches, calibration_key, first_windows, unstopped
from lowbit_ft.stages.synthesis import train_source
from tests.data_tools import write
from tests.line_tools import ROOT, recipe

pytestmark = pytest.mark.usefixtures("in_the_repository")


def test_calibration_reads_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(
        tmp_path / "run",
        "quant.calibrate=gptq",
        "quant.calibration.samples=5",
        "quant.calibration.sequence_len=64",
    )
    here, seen = start(made), []
    real = data.read_rows
    monkeypatch.setattr(data, "read_rows", lambda *a, **k: (seen.append(1) or row for row in real(*a, **k)))
    batches = calibration_batches(here)
    assert sum(len(b["input_ids"]) for b in batches) == 5
    assert 0 < len(seen) <= 60


def test_of_pairs_of_answers_the_calibrator_sees_the_chosen_ones(tmp_path: Path) -> None:
    def windows(form: str, kind: str) -> list[list[int]]:
        keys = ["quant.calibration.samples=3", "quant.calibration.sequence_len=128", "quant.calibrate=gptq"]
        for name in ("train", "valid"):
            path = ROOT / "recipes" / "assets" / "preferences" / f"{name}.jsonl"
            keys.append(f"data.{name}={{path: {path}, format: {form}}}")
        made = recipe(tmp_path / form, f"train.signal={{kind: {kind}}}", *keys)
        return [row for batch in calibration_batches(start(made)) for row in batch["input_ids"].tolist()]

    assert windows("preference", "dpo") == windows("chosen", "labels") != []


def test_a_turn_that_no_server_stops_at_is_said(tmp_path: Path):
    """The tiny Llama stops where its turns end; a copy of it that stops at another token only is told on."""
    tiny = ROOT / "recipes" / "assets" / "tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(str(tiny))

    def said(folder: Path, form: str = "chat", tokenizer: Any = tokenizer) -> str | None:
        asked = SimpleNamespace(data=SimpleNamespace(train=SimpleNamespace(format=form)))
        return unstopped(
            SimpleNamespace(recipe=asked, tokenizer=tokenizer, checkpoint=SimpleNamespace(folder=folder))
        )  # type: ignore[arg-type]

    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    message = said(tmp_path)
    assert message and "<|im_end|> (3)" in message and "eos_token_id: [0, 3]" in message
    assert said(tmp_path, "completion") is None
    assert said(tiny) is None
    # An end that is no single token: its first would be "<", which stops everything.
    foreign = AutoTokenizer.from_pretrained(str(tiny))
    foreign.chat_template = (
        "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|/turn|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    message = said(tmp_path, tokenizer=foreign)
    assert message and "the text '<|/turn|>', which is no single token" in message and "[0" not in message


def test_calibration_takes_its_windows_from_every_source(tmp_path: Path) -> None:
    rows = {
        name: [{"prompt": "", "completion": f"{name} {i}"} for i in range(9)] for name in ("left", "right")
    }
    files = [write(tmp_path, given, f"{name}.jsonl") for name, given in rows.items()]
    made = recipe(
        tmp_path / "run",
        f"data.train=[{', '.join(f'{{path: {file}, format: completion}}' for file in files)}]",
        "data.packing=false",
        "quant.calibrate=gptq",
        "quant.calibration.samples=1",
        "quant.calibration.sequence_len=64",
    )
    here = start(made)
    pool = first_windows(here, train_source(here), 4, {"sequence_len": 64})
    said = [here.tokenizer.decode(window.input_ids, skip_special_tokens=True).split() for window in pool]
    assert said == [["left", "0"], ["right", "0"], ["left", "1"], ["right", "1"]]
    assert len(calibration_batches(here)) == 1
    key = calibration_key(here)
    section = made.data.model_copy(update={"train": list(reversed(made.data.train))})
    here.recipe = made.model_copy(update={"data": section})
    assert calibration_key(here) != key and unstopped(here) is None
