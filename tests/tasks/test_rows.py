"""Rows with answers: their columns, their labels, and what is wrong with them, said with file and row."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from lowbit_ft.data.errors import DataError
from lowbit_ft.data.windows import IGNORE
from lowbit_ft.tasks import TASKS
from lowbit_ft.tasks.labels import found_labels, known_labels
from tests import encoders


def source_of(path: Path, found: list[dict[str, Any]]) -> Any:
    file = encoders.write(path / "rows.jsonl", found)
    return SimpleNamespace(path=file, format=None, split="train", name=None, revision=None, limit=None)


def read(path: Path, found: list[dict[str, Any]], on_bad_row: str = "error", **keys: Any) -> Any:
    keys = {"kind": "sequence_classification", "labels": ("red", "blue")} | keys
    section = SimpleNamespace(sequence_len=keys.pop("sequence_len", 16), on_bad_row=on_bad_row)
    task = TASKS[keys["kind"]].model_validate(keys)
    return task.examples(source_of(path, found), section, encoders.tokenizer())


def test_a_pair_is_told_apart_and_the_longer_text_is_cut(tmp_path: Path) -> None:
    row = {"premise": "rose ruby rose ruby rose", "hypothesis": "sea ice", "label": "blue", "idx": 3}
    made = read(tmp_path, [row], sequence_len=8)
    ids = [encoders.WORDS.index(w) for w in ("[CLS]", "rose", "ruby", "rose", "[SEP]", "sea", "ice", "[SEP]")]
    assert made[0] == {
        "input_ids": ids,
        "token_type_ids": [0] * 5 + [1] * 3,
        "attention_mask": [1] * 8,
        "labels": 1,
    }
    assert made.report.truncated == 1 and made.report.unread == {"idx": 1}
    assert str(made.report).startswith("1 of 1 rows used: 8 tokens, the longest row 8\nanswers: blue 1")
    assert read(tmp_path, [{"s": "sea", "label": 1}], text=("s",))[0]["labels"] == 1


def test_the_first_token_of_a_word_carries_its_label(tmp_path: Path) -> None:
    keys = {"kind": "token_classification", "labels": ("O", "red")}
    row = {"tokens": ["rose,ruby", "the"], "ner_tags": ["red", 0]}  # the tokenizer cuts the first in three
    assert read(tmp_path, [row], **keys)[0]["labels"] == [IGNORE, 1, IGNORE, IGNORE, 0, IGNORE]
    whole = read(tmp_path, [row], **keys, label_all_tokens=True)
    assert whole[0]["labels"] == [IGNORE, 1, 1, 1, 0, IGNORE]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "sea"}, "key 'label' is missing; the row's keys are: 'text'"),
        ({"text": 3, "label": "red"}, "'text' must be a string; got a number"),
        ({"text": "sea", "label": "rad"}, "got label 'rad'; allowed: red, blue .*did you mean 'red'"),
        ({"text": "sea", "label": 2}, "got label 2; allowed: 0 to 1"),
        ({"text": "sea", "label": True}, "the name or the number of a label; got a boolean"),
        ({"text": "sea", "label": math.nan}, "the name or the number of a label; got NaN"),
        ({"text": "sea", "label": 1.5}, "the name or the number of a label; got 1.5"),
    ],
)
def test_a_malformed_row_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    found = [*encoders.rows(2), row]
    with pytest.raises(DataError, match=rf"rows.jsonl:3: .*{said}"):
        read(tmp_path, found)
    skipped = read(tmp_path, found, on_bad_row="skip")
    assert len(skipped) == 2 and skipped.report.skipped == 1 and "rows.jsonl:3" in str(skipped.report)


def test_malformed_words_and_numbers(tmp_path: Path) -> None:
    keys = {"kind": "token_classification", "labels": ("O", "red")}
    with pytest.raises(DataError, match="must be a list of 2 labels, one for each word"):
        read(tmp_path, [{"tokens": ["a", "b"], "ner_tags": [0]}], **keys)
    regression = {"labels": None, "problem_type": "regression"}
    for label, told in (("much", "'much'"), (math.nan, "NaN"), (-math.inf, "-inf"), (True, "a boolean")):
        with pytest.raises(DataError, match=f"'label' must be a finite number; got {told}"):
            read(tmp_path, [{"text": "a", "label": label}], **regression)
    assert read(tmp_path, [{"text": "a", "label": "2.5"}], **regression)[0]["labels"] == 2.5
    with pytest.raises(DataError, match=r"its columns are a, label, and none of the usual ones .*task.text"):
        read(tmp_path, [{"a": "a", "label": "red"}])


def test_labels_of_rows_and_of_the_checkpoint(tmp_path: Path) -> None:
    named = source_of(tmp_path, encoders.rows(12))
    assert found_labels(named, "label", {}) == ["blue", "red"]
    config = {"id2label": {"0": "red", "1": "grey", "2": "blue"}}
    assert found_labels(named, "label", config) == ["red", "grey", "blue"] == known_labels(config)
    numbers = source_of(tmp_path, [{"label": 2}, {"label": [0, 1]}])
    assert found_labels(numbers, "label", {}) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert found_labels(numbers, "label", config) == ["red", "grey", "blue"]
    with pytest.raises(DataError, match="names and numbers; name the labels in task.labels"):
        found_labels(source_of(tmp_path, [{"label": 2}, {"label": "a"}]), "label", {})
    with pytest.raises(DataError, match="holds the label -1: rows without an answer"):
        found_labels(source_of(tmp_path, [{"label": -1}]), "label", {})
    with pytest.raises(DataError, match="no row has a label in 'label'"):
        found_labels(source_of(tmp_path, [{"text": "a"}]), "label", {})


def test_a_number_that_is_the_name_of_another_label_is_refused(tmp_path: Path) -> None:
    """1 is the second label, or the one that is called 1; as text it is the name."""
    keys = {"labels": ("1", "2")}
    for value in (1, 2):
        with pytest.raises(
            DataError, match=rf"got the number {value}, and '{value}' is the name of label .*\"{value}\""
        ):
            read(tmp_path, [{"text": "sea", "label": value}], **keys)
    assert read(tmp_path, [{"text": "sea", "label": "2"}], **keys)[0]["labels"] == 1
    assert read(tmp_path, [{"text": "sea", "label": 0}], **keys)[0]["labels"] == 0, "no name is 0"
    same = read(tmp_path, [{"text": "sea", "label": 1}], labels=("0", "1"))
    assert same[0]["labels"] == 1, "its number and its name are one label"


def test_a_text_without_a_token_is_malformed(tmp_path: Path) -> None:
    """A tokenizer that adds no special tokens makes nothing of it."""
    bare: Any = encoders.tokenizer()
    bare._tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    task = TASKS["sequence_classification"].model_validate(
        {"kind": "sequence_classification", "labels": ("red", "blue")}
    )
    section = SimpleNamespace(sequence_len=16, on_bad_row="error")
    found = [{"text": "rose", "label": "red"}, {"text": "", "label": "red"}]
    with pytest.raises(DataError, match=r"rows.jsonl:2: its text has no token"):
        task.examples(source_of(tmp_path, found), section, bare)


def test_labels_have_names_that_differ() -> None:
    for kind in ("sequence_classification", "token_classification", "image_classification"):
        with pytest.raises(ValueError, match="'red' more than once; allowed: names that differ"):
            TASKS[kind].model_validate({"kind": kind, "labels": ["red", "blue", "red"]})
    assert known_labels({"id2label": {"0": "red", "1": "red"}}) == []
