"""The whole line for a classifier: its labels, the head that trains and ships, readers we did not write."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from lowbit_ft import pipeline as line
from lowbit_ft.export.reader import load_exported
from lowbit_ft.integrations.adapter_files import read_adapter
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.stages.outside import export_outside
from lowbit_ft.tasks.batches import pad
from tests import encoders

TEXTS = [row["text"] for row in encoders.rows(12, seed=5)]


@dataclass(frozen=True)
class Ran:
    folder: Path
    said: str

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        found = json.loads((self.folder / "evaluation.json").read_text())["rows"]
        return {row["stage"]: row for row in found}


def run(folder: Path, task: Any = "sequence_classification", **changes: Any) -> Path:
    model = encoders.encoder(folder / "model")
    train = encoders.write(folder / "train.jsonl", encoders.rows(96))
    valid = encoders.write(folder / "valid.jsonl", encoders.rows(48, seed=1))
    data = {"train": {"path": train}, "valid": {"path": valid}, "sequence_len": 16}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(encoders.recipe(folder, model, task, train, data=data, **changes)))
    line.run(load_recipe(file))
    return folder / "run"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Sixty steps, W4 in the format of compressed-tensors."""
    folder = tmp_path_factory.mktemp("line")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("lowbit_ft.session.Session.say", lambda _, text: said.append(str(text)))
        steps = {"max_steps": 60, "save_every": 50, "eval_every": 30, "learning_rate": 1e-2}
        made = run(
            folder,
            train={**steps, "micro_batch_size": 16, "gradient_accumulation_steps": 1},
            export={"format": "compressed-tensors"},
        )
    return Ran(made, "\n".join(said))


def test_it_learns_and_what_is_trained_is_what_ships(ran: Ran) -> None:
    rows = ran.rows
    assert list(rows) == ["base", "quantized", "trained", "merged", "exported"]
    assert rows["trained"]["scores"]["accuracy"] > 0.9 > rows["quantized"]["scores"]["accuracy"]
    for stage in ("merged", "exported"):
        assert (rows[stage]["loss"], rows[stage]["scores"]) == (
            rows["trained"]["loss"],
            rows["trained"]["scores"],
        )
    assert rows["trained"]["tokens"] == 48 and rows["trained"]["perplexity"] is None
    assert "head: drawn by train.seed" in ran.said and "answers: " in ran.said


def test_the_labels_are_in_config_json_and_in_the_recipe(ran: Ran) -> None:
    assert getattr(load_recipe(ran.folder / "recipe.yaml").task, "labels", None) == ("blue", "red")
    for stage in ("base", "merged", "exported"):
        config = json.loads((ran.folder / stage / "config.json").read_text())
        assert config["id2label"] == {"0": "blue", "1": "red"} and config["label2id"]["red"] == 1
        assert config["architectures"] == ["BertForSequenceClassification"]
        assert config["problem_type"] == "single_label_classification"


def test_the_head_is_the_same_in_adapter_merged_and_exported(ran: Ran) -> None:
    tensors = read_adapter(ran.folder / "adapter")[1]
    state = {k.removeprefix("base_model.model."): v for k, v in tensors.items() if "lowbit_adapters" not in k}
    parts = ("bert.pooler.dense", "classifier")
    assert set(state) == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    base = load_file(ran.folder / "base" / "model.safetensors")
    for stage in ("merged", "exported"):
        files = load_file(ran.folder / stage / "model.safetensors")
        for name, value in state.items():  # a base model's checkpoint calls its parts without the prefix
            key = name if name in files else name.removeprefix("bert.")
            assert torch.equal(files[key], value) and not torch.equal(base[key], value), name


def test_transformers_reads_both_folders_alike(ran: Ran) -> None:
    """Through its own classes and pipeline: the same labels, logits to the last bit of a sum."""
    found = []
    for stage in ("merged", "exported"):
        asked = pipeline("text-classification", str(ran.folder / stage))
        found.append([(one["label"], one["score"]) for one in asked(TEXTS)])
    assert [a for a, _ in found[0]] == [a for a, _ in found[1]]
    torch.testing.assert_close(*(torch.tensor([b for _, b in one]) for one in found), rtol=1e-5, atol=1e-6)
    right = [row["label"] for row in encoders.rows(12, seed=5)]
    assert sum(a == b for (a, _), b in zip(found[0], right, strict=True)) >= 10


def test_peft_reads_the_adapter_with_its_head(ran: Ran) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(ran.folder / "base")
    model = PeftModel.from_pretrained(base, str(ran.folder / "adapter")).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(ran.folder / "merged").eval()
    batch = AutoTokenizer.from_pretrained(ran.folder / "merged")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, merged(**batch).logits, rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing(ran: Ran) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(ran.folder / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(ran.folder / "merged")
    rows = [dict(tokenizer(text)) for text in TEXTS[:4]]
    taken = frozenset(("input_ids", "attention_mask", "token_type_ids"))
    with torch.no_grad():
        whole = model(**pad(rows, 0, taken)).logits
        alone = torch.cat([model(**pad([row], 0, taken)).logits for row in rows])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)


def test_the_card_and_the_report_show_the_scores(ran: Ran) -> None:
    accuracy = f"{ran.rows['exported']['scores']['accuracy']:.4f}"
    card = (ran.folder / "exported" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "AutoModelForSequenceClassification" in card
    assert "| stage | loss | accuracy | f1 | matthews |" in card and accuracy in card
    assert "\nTrained whole, and not packed: `bert.pooler`, `classifier`.\n" in card
    page = (ran.folder / "report.html").read_text()
    assert "What was trained is what ships: trained = merged = exported loss" in page
    assert f"{accuracy}</td>" in page and "48 answers" in page


def test_merge_and_measure_again_from_the_folder(ran: Ran) -> None:
    before = ran.rows
    line.merge(ran.folder)  # which compares with merged/
    line.evaluate(ran.folder)
    assert ran.rows == before


def test_a_folder_goes_on_without_its_run_and_writes_no_text(ran: Ran, tmp_path: Path) -> None:
    folder = line.export(ran.folder / "merged", "compressed-tensors", tmp_path / "again")
    ours = load_file(ran.folder / "exported" / "model.safetensors")
    again = load_file(folder / "model.safetensors")
    assert all(
        torch.equal(tensor, ours[name.removeprefix("bert.")] if name not in ours else ours[name])
        for name, tensor in again.items()
    )
    assert "pipeline_tag: text-classification" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="SequenceClassification and writes no text"):
        line.generate(ran.folder, "hello", device="cpu")


def test_resumed_it_is_the_same(ran: Ran, tmp_path: Path) -> None:
    """From the checkpoint of step 50: adapters and head, bit for bit."""
    again = tmp_path / "run"
    shutil.copytree(ran.folder, again)
    for name in ("adapter", "merged", "exported", "checkpoints/step-00000060"):
        assert (again / name).is_dir(), sorted(p.name for p in (again / "checkpoints").iterdir())
        shutil.rmtree(again / name)
    line.train(load_recipe(ran.folder / "recipe.yaml", [f"output={again}"]))
    first, second = (read_adapter(f / "adapter")[1] for f in (ran.folder, again))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_an_adapter_folder_ships_with_its_head(ran: Ran, tmp_path: Path) -> None:
    export_outside(ran.folder / "adapter", "compressed-tensors", tmp_path / "made")
    ours, theirs = (load_file(f / "model.safetensors") for f in (ran.folder / "exported", tmp_path / "made"))
    short = {name.removeprefix("bert."): tensor for name, tensor in theirs.items()}
    assert {name.removeprefix("bert.") for name in ours} == short.keys()
    assert all(torch.equal(short[name.removeprefix("bert.")], tensor) for name, tensor in ours.items())


def test_onnx_runtime_says_the_same(ran: Ran, tmp_path: Path) -> None:
    """Padded rows too; codes and scales are compared by the export."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_outside(ran.folder / "merged", "onnx", tmp_path / "made")
    batch = AutoTokenizer.from_pretrained(ran.folder / "merged")(TEXTS, padding=True, return_tensors="pt")
    ours = AutoModelForSequenceClassification.from_pretrained(ran.folder / "merged").eval()
    theirs = load_exported(tmp_path / "made", dtype=torch.float32)
    with torch.no_grad():
        want, found = ours(**batch).logits, theirs(**batch).logits
    assert not batch["attention_mask"].all() or len(TEXTS) == 1
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
