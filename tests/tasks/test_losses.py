"""Every task's loss against the one that transformers' own model computes of the same batch, and its scores
against numbers by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lowbit_ft.data.windows import IGNORE
from lowbit_ft.model.images import read_processor
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.tasks import TASKS, scores
from lowbit_ft.tasks.base import Feed, inputs_of
from lowbit_ft.tasks.labelled import Answered, Labelled
from lowbit_ft.tasks.masked_lm import Hiding
from lowbit_ft.train.losses import LABELS
from tests import encoders, images

SECTION = SimpleNamespace(sequence_len=16, on_bad_row="error", packing=True, streaming=False, train_on="all")
NUMBERS = [{"text": row["text"], "label": len(row["text"]) / 10} for row in encoders.rows(9)]
SETS = [{"text": row["text"], "label": [row["label"]][: i % 3]} for i, row in enumerate(encoders.rows(9))]
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "masked_lm": ({"kind": "masked_lm"}, encoders.rows(9)),
    "sequence_classification": (
        {"kind": "sequence_classification", "labels": ("red", "blue")},
        encoders.rows(9),
    ),
    "several labels": (
        {
            "kind": "sequence_classification",
            "labels": ("red", "blue", "grey"),
            "problem_type": "multi_label_classification",
        },
        SETS,
    ),
    "a number": ({"kind": "sequence_classification", "problem_type": "regression"}, NUMBERS),
    "token_classification": (
        {"kind": "token_classification", "labels": ("O", *encoders.COLOURS)},
        encoders.tagged(9),
    ),
    "question_answering": ({"kind": "question_answering", "stride": 2}, encoders.asked(9)),
    "image_classification": ({"kind": "image_classification", "labels": images.LABELS}, images.rows(9)),
}


def task_of(name: str) -> Labelled:
    keys = CASES[name][0]
    made = TASKS[keys["kind"]].model_validate(keys)
    assert isinstance(made, Labelled)
    return made


def read_by(task: Labelled, path: Path) -> tuple[Any, Any]:
    """(the configuration of a small model, what reads its rows)"""
    if task.reads == "text":
        return encoders.KINDS["bert"](), encoders.tokenizer()
    folder = images.vit(path / "vit")
    return transformers.AutoConfig.from_pretrained(folder), read_processor(folder)


def batches_of(
    task: Labelled, path: Path, found: list[dict[str, Any]], model: Any, tokenizer: Any
) -> list[dict[str, Tensor]]:
    pictures = task.reads == "images"
    source = SimpleNamespace(
        path=str(images.folder_of(path / "pictures", found, "train"))
        if pictures
        else encoders.write(path / "rows.jsonl", found),
        format="text" if task.windows else None,
        split="train",
        name=None,
        revision=None,
        limit=None,
    )
    examples = task.examples(source, SECTION, tokenizer)
    feed = Feed(SimpleNamespace(train=SimpleNamespace(seed=0)), tokenizer)
    return list(task.batches(feed, model, examples, 4, shuffle=False).one_epoch())


def test_every_task_has_a_case() -> None:
    # no models of transformers, or a loss that is the model's own: files of their own
    of_ours = {"speech_tokens", "object_detection", "image_generation"}
    assert {keys["kind"] for keys, _ in CASES.values()} == set(TASKS) - {"causal_lm"} - of_ours


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_loss_of_transformers(name: str, tmp_path: Path) -> None:
    task = task_of(name)
    purpose = task.purpose(0)
    assert purpose is not None
    config, tokenizer = read_by(task, tmp_path)
    config = purpose.applied(config, tmp_path)
    torch.manual_seed(0)
    model = getattr(transformers, task.auto).from_config(config).eval()
    found = batches_of(task, tmp_path, CASES[name][1], model, tokenizer)
    lengths = {tuple(next(iter(batch.values())).shape) for batch in found}
    assert len(found) > 1 and len(lengths) > 1, "ragged"
    for batch in found:
        goal, count = Answered(task), int(task.count(batch))
        assert count == int(goal.counts(LABELS, batch)) > 0
        asked = goal.asked(model, LABELS, batch, torch.device("cpu"), measured=False)
        ours = task.loss(model(**inputs_of(batch, task.answers)), asked["labels"].values)
        theirs = model(**batch).loss
        torch.testing.assert_close(ours / count, theirs, rtol=1e-6, atol=1e-7)
        gradients = []
        for loss in (ours / count, theirs):
            model.zero_grad()
            loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(gradients[0]) == len(gradients[1]) > 20
        for mine, other in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


def test_what_is_hidden() -> None:
    """A share of the open tokens, 8 in 10 of them by the mask token; of the key alone."""
    tokenizer = encoders.tokenizer()
    hide = Hiding(0.15, tokenizer, encoders.VOCABULARY)
    ids = [2, *([20] * 4000), 3]
    shown, labels = hide(ids, "0/0/7")
    looked = [place for place, label in enumerate(labels) if label != IGNORE]
    assert len(looked) == 600 and 0 not in looked and 4001 not in looked
    assert all(labels[place] == ids[place] for place in looked)
    assert all(shown[p] == ids[p] for p in set(range(len(ids))) - set(looked))
    masked = sum(shown[place] == tokenizer.mask_token_id for place in looked)
    kept = sum(shown[place] == 20 for place in looked)
    assert 450 < masked < 510 and 40 < kept < 85
    assert hide(ids, "0/0/7") == (shown, labels) != hide(ids, "0/1/7")


def test_scores_by_hand() -> None:
    two = scores.of_classes([1, 1, 0, 0], [1, 0, 0, 0], 2)
    assert two["accuracy"] == 0.75 and two["f1"] == pytest.approx(2 / 3)
    assert two["matthews"] == pytest.approx((1 * 2 - 0 * 1) / (1 * 2 * 2 * 3) ** 0.5)
    three = scores.of_classes([0, 1, 2], [0, 1, 1], 3)
    assert three["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)  # macro: the label that nobody said counts
    tokens = scores.of_tokens([0, 0, 1, 2], [0, 1, 1, 0], outside=0)
    assert tokens["accuracy"] == 0.5 and tokens["micro_f1"] == pytest.approx(2 * 1 / (2 + 2))
    assert scores.of_sets([[1, 0], [1, 1]], [[1, 0], [0, 1]])["accuracy"] == 0.5
    numbers = scores.of_numbers([1.0, 2.0, 3.0], [2.0, 4.0, 9.0])
    assert numbers["spearman"] == pytest.approx(1) and 0.9 < numbers["pearson"] < 1
    assert scores.of_numbers([1.0, 2.0], [3.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_a_word_alone_is_a_task(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
    assert (
        load_recipe(root).task
        == load_recipe(root, ["task=causal_lm"]).task
        == TASKS["causal_lm"](kind="causal_lm")
    )
