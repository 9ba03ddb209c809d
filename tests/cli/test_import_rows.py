"""import-recipe, the data sets: it claims what the readers of data/ do, and lists the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowbit_ft.cli import import_rows
from lowbit_ft.cli.import_draft import Draft
from lowbit_ft.cli.import_recipe import import_recipe
from lowbit_ft.data.formats import FORMATS
from tests.cli.trainer_files import TINY, imported


def axolotl(tmp_path: Path, **entry: Any) -> tuple[Draft, dict[str, str]]:
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump({"base_model": "a/b", "datasets": [{"type": "chat_template", **entry}]}))
    draft = import_recipe(path)
    return draft, dict(draft.left)


def factory(tmp_path: Path, entry: dict[str, Any]) -> tuple[Draft, dict[str, str]]:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "a/b", "dataset": "mine", "stage": "sft"}))
    draft = import_recipe(path)
    return draft, dict(draft.left)


def test_what_axolotl_says_and_the_readers_do(tmp_path: Path) -> None:
    draft, left = axolotl(
        tmp_path,
        path="a/rows",
        split="train",
        field_messages="conversations",
        message_field_training="train",
        field_system="system",
        field_tools="tools",
        train_on_eos="turn",
    )
    assert (
        not [key for key in left if key.startswith("datasets")] and draft.get("data.train.split") == "train"
    )
    _, left = axolotl(
        tmp_path,
        path="a/rows",
        split="train[:10%]",
        field_messages="dialogue",
        message_field_training="learn_it",
        message_field_training_detail="parts",
        roles_to_train=["user"],
    )
    assert {key.removeprefix("datasets.0.") for key in left if key.startswith("datasets")} == {
        "split",
        "field_messages",
        "message_field_training",
        "message_field_training_detail",
        "roles_to_train",
    }
    assert "whole or not at all" in left["datasets.0.message_field_training_detail"]


@pytest.mark.parametrize(
    "path, files, ours, told",
    [
        ("json", "rows.jsonl", "rows.jsonl", False),
        ("json", ["a.jsonl", "b.jsonl"], "a.jsonl", True),
        ("org/rows", "a.jsonl", "org/rows", True),
        ("org/rows", None, "org/rows", False),
        ("HERE", "a.jsonl", "HERE/a.jsonl", False),
    ],
)
def test_data_files_are_files_of_what_path_names(path, files, ours, told, tmp_path: Path) -> None:
    here = str(tmp_path)
    draft, left = axolotl(tmp_path, path=path.replace("HERE", here), data_files=files)
    assert draft.get("data.train.path") == ours.replace("HERE", here)
    assert ("datasets.0.data_files" in left) == told


def test_a_style_of_alpaca_is_not_claimed(tmp_path: Path) -> None:
    assert "datasets.0.type" not in axolotl(tmp_path, path="a/rows", type="alpaca")[1]
    assert "Stanford Alpaca" in axolotl(tmp_path, path="a/rows", type="alpaca:phi")[1]["datasets.0.type"]


def test_what_llama_factory_says_and_the_readers_do(tmp_path: Path) -> None:
    entry = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "system", "tools": "tools"},
        "tags": {"role_tag": "from", "user_tag": "human", "function_tag": "function_call"},
    }
    assert "dataset" not in factory(tmp_path, entry)[1]
    entry["columns"] = {"messages": "dialogue", "system": "system"}
    assert "names its columns (messages)" in factory(tmp_path, entry)[1]["dataset"]
    entry["columns"], entry["tags"] = {}, {"user_tag": "customer"}
    assert "names its tags (user_tag)" in factory(tmp_path, entry)[1]["dataset"]
    entry["tags"], entry["ranking"] = {}, True
    assert "no key here does what its ranking does" in factory(tmp_path, entry)[1]["dataset"]
    draft, left = factory(tmp_path, {"file_name": "rows.json", "columns": {"prompt": "instruction"}})
    assert draft.get("data.train.format") == "alpaca" and "theirs the chat template" in left["dataset"]


def test_the_usual_names_are_those_that_the_formats_read() -> None:
    assert set(import_rows.AXOLOTL_FORMATS.values()) <= FORMATS.keys()
    for name, usual in import_rows._COLUMNS_USUAL.items():
        ours = FORMATS[name].columns.keys() - {"codec"}  # which `lowbit-ft encode` writes, and nobody else
        assert {one for several in usual.values() for one in several} == ours


def test_several_data_sets_are_a_list(tmp_path: Path) -> None:
    """Axolotl's are put together; LLaMA-Factory's as mix_strategy and interleave_probs say."""
    entries = [
        {"path": "a/b", "type": "chat_template"},
        {"path": "c/d", "type": "alpaca:phi", "split": "test"},
    ]
    given = {"base_model": str(TINY), "datasets": entries, "test_datasets": entries}
    recipe, left = imported(tmp_path, given | {"adapter": "lora", "num_epochs": 1})
    for sources in (recipe.data.train, recipe.data.valid):
        assert [(s.path, s.format, s.split) for s in sources] == [
            ("a/b", "chat", "train"),
            ("c/d", "alpaca", "test"),
        ]
    assert {"datasets.1.type", "test_datasets.1.type"} <= left.keys() and recipe.data.train_on == "assistant"
    texts = [entries[0], {"path": "e/f", "type": "completion"}]
    given = {"base_model": str(TINY), "datasets": texts, "sample_packing": True}
    recipe, left = imported(tmp_path, given)
    assert recipe.data.packing is False and "do not share windows" in left["sample_packing"]

    (tmp_path / "dataset_info.json").write_text(
        json.dumps({name: {"hf_hub_url": f"o/{name}"} for name in "ab"})
    )
    given = {"model_name_or_path": str(TINY), "dataset": "a, b", "max_samples": 5}
    for keys, weights, strategy, told in (
        ({}, [None, None], "first_exhausted", None),
        ({"interleave_probs": "0.7,0.3"}, [None, None], "first_exhausted", "every row stands in"),
        ({"mix_strategy": "interleave_over"}, [1, 1], "all_exhausted", None),
        (
            {"mix_strategy": "interleave_under", "interleave_probs": "0.7,0.3"},
            [0.7, 0.3],
            "first_exhausted",
            None,
        ),
        (
            {"mix_strategy": "interleave_under", "interleave_probs": "0.7"},
            [None, None],
            "first_exhausted",
            "of 2",
        ),
    ):
        recipe, left = imported(tmp_path, given | keys)
        assert [(s.path, s.limit, s.weight) for s in recipe.data.train] == [
            ("o/a", 5, weights[0]),
            ("o/b", 5, weights[1]),
        ]
        assert recipe.data.stopping_strategy == strategy and (told or "") in left.get("interleave_probs", "")
        assert bool(told) == ("interleave_probs" in left)
