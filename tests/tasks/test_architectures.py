"""Encoders of every kind with every head: packed, adapted, trained, merged, read back; step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, beside_state, packed_layers, train_head
from lowbit_ft.export.reader import load_exported
from lowbit_ft.files.tensorfile import CheckpointError
from lowbit_ft.merge import merge
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from lowbit_ft.model.purpose import AUTO, Purpose, answer_of, head_parameters, head_parts
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.tasks import TASKS
from tests import encoders

QUANT = QuantSection.model_validate({"bits": 4, "group_size": 32, "calibrate": "absmax"})
ADAPTER = ADAPTERS["l4q"].model_validate({"method": "l4q", "rank": 2, "alpha": 4})
BATCH = {"input_ids": torch.tensor([[2, 14, 15, 9, 3, 0], [2, 8, 20, 21, 22, 3]])}
BATCH["attention_mask"] = (BATCH["input_ids"] != 0).long()
PACKED = {"modernbert": 8, "deberta-v2": 16}  # linears of two layers; 12 in the others


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bodies")
    return {kind: encoders.encoder(folder / kind, kind) for kind in encoders.KINDS}


def opened(folder: Path, task: str) -> Checkpoint:
    purpose = TASKS[task].model_validate({"kind": task}).purpose(3)
    return Checkpoint.open(folder, dtype="float32", purpose=purpose)


def attention(kind: str) -> str:
    return "eager" if kind == "deberta-v2" else "sdpa"


@pytest.mark.parametrize(
    "task", ["sequence_classification", "token_classification", "masked_lm", "question_answering"]
)
@pytest.mark.parametrize("kind", encoders.KINDS)
def test_trained_merged_and_read_back(kind: str, task: str, bodies: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = opened(bodies[kind], task)
    model, _ = quantize(checkpoint, QUANT, dtype=torch.float32, attention=attention(kind))
    names = [name for name, _ in packed_layers(model)]
    assert len(names) == PACKED.get(kind, 12) and all(".0." in name or ".1." in name for name in names)
    attach(model, ADAPTER)
    head = train_head(model, head_parameters(model))
    assert head and not {row.layer for row in head} & set(names)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    before = {name: tensor.clone() for name, tensor in beside_state(model).items()}
    for _ in range(2):
        optimizer.zero_grad()
        answer_of(model(**BATCH)).float().square().mean().backward()
        optimizer.step()
    moved = [name for name, tensor in beside_state(model).items() if not torch.equal(tensor, before[name])]
    assert len(moved) >= 2, "the head trains"
    merge(model, checkpoint, tmp_path / "merged")
    read = load_exported(tmp_path / "merged", dtype=torch.float32, attention=attention(kind))
    assert type(read) is type(model) and type(read).__name__ == checkpoint.config.architectures[0]
    with torch.no_grad():
        assert torch.equal(answer_of(read(**BATCH)), answer_of(model.eval()(**BATCH)))


def test_every_purpose_has_a_class() -> None:
    found = {(task.auto, task.pipeline) for task in TASKS.values() if not task.language}
    assert found == set(AUTO.items())


def test_the_head_is_drawn_once_and_by_the_seed(bodies: dict[str, Path]) -> None:
    """The same whenever it is read, as transformers draws it (deviation 0.02, biases 0), another by another
    seed."""
    one, two = (load_model(opened(bodies["roberta"], "sequence_classification")) for _ in range(2))
    drawn = opened(bodies["roberta"], "sequence_classification")
    drawn.empty_model()
    assert set(drawn.drawn) == {
        f"classifier.{part}.{k}" for part in ("dense", "out_proj") for k in ("weight", "bias")
    }
    for name, value in head_parameters(one).items():
        assert torch.equal(value, two.get_parameter(name)) and torch.equal(value, drawn.drawn[name])
    weight = one.classifier.dense.weight.detach()
    assert 0.015 < float(weight.std()) < 0.025 and not one.classifier.dense.bias.any()
    other = Checkpoint.open(
        bodies["roberta"], dtype="float32", purpose=Purpose("AutoModelForSequenceClassification", {}, seed=4)
    )
    assert not torch.equal(other.weight_for("classifier.dense.weight"), weight)


def test_another_head_is_left_out_and_ours_is_read(tmp_path: Path) -> None:
    folder = encoders.encoder(tmp_path / "masked", "bert", AutoModelForMaskedLM)
    checkpoint = opened(folder, "sequence_classification")
    model = checkpoint.empty_model()
    assert head_parts(model) == ["bert.pooler", "classifier"]
    assert not any(name.startswith("cls.") for name in checkpoint.names())
    fine = encoders.encoder(tmp_path / "fine", "bert", AutoModelForSequenceClassification)
    again = opened(fine, "sequence_classification")
    assert not load_model(again).training and not again.drawn


def test_a_head_of_other_labels_that_does_not_train_is_named(tmp_path: Path) -> None:
    folder = encoders.encoder(tmp_path / "three", "bert", AutoModelForSequenceClassification, num_labels=3)
    task = TASKS["sequence_classification"].model_validate(
        {"kind": "sequence_classification", "labels": ("a", "b"), "train_head": False}
    )
    with pytest.raises(CheckpointError, match=r"classifier.weight.*\[3, 32\].*\[2, 32\].*task.labels"):
        Checkpoint.open(folder, purpose=task.purpose(0)).refuse_strangers()
    opened(folder, "sequence_classification").refuse_strangers()  # labels that nobody has named are its own
