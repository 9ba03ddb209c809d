"""logits and mix of tasks whose rows have answers: the equations, the law, and a masked_lm that loses
its weights as the paper has it (Prune Once for All)."""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForMaskedLM

from lowbit_ft import pipeline
from lowbit_ft.export.reader import read_weights
from lowbit_ft.plan.plan import plan
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.signals import SIGNALS, Lesson, OtherModel
from lowbit_ft.tasks import TASKS
from lowbit_ft.tasks.labelled import Labels
from tests import encoders
from tests.signals.common import options
from tests.signals.test_layers import encoder

TASK: Any = TASKS["sequence_classification"].model_validate(
    {"kind": "sequence_classification", "labels": ["red", "blue"]}
)
BATCH = {
    "input_ids": torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(0)),
    "attention_mask": (torch.arange(7) < torch.tensor([7, 5, 6])[:, None]).long(),
}
RIGHT = torch.tensor([0, 1, 0])


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A student and another one, moved from it."""
    student = encoder()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter))
    return student, teacher


def sums_of(kind: str, student: Any, teacher: Any, measured: bool = False, **keys: Any) -> dict[str, Tensor]:
    """The sums by part, of one training forward."""
    lesson = Lesson(SIGNALS[kind], options(kind, **keys), OtherModel(teacher, {"teacher": "checkpoint"}))
    with ExitStack() as stack:
        forward = MethodType(TASK.goal.forward(student, None, lesson, stack), student)
        sums = forward(**BATCH, labels=Labels({"labels": RIGHT}, measured))
    return dict(zip(["labels"] if measured else lesson.parts, sums, strict=True))


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_the_parts_are_the_equations(pair: tuple[Any, Any], divergence: str) -> None:
    """In float64, from the logits of both: labels at temperature 1, T^2 KL at the temperature."""
    keys = {"temperature": 2.0, "divergence": divergence}
    sums = sums_of("mix", *pair, label_weight=0.3, **keys)
    with torch.no_grad():
        ours, theirs = (model(**BATCH).logits.double() for model in pair)
    label = -ours.log_softmax(-1)[torch.arange(3), RIGHT].sum()
    p, q = (z.div(2).log_softmax(-1) for z in ((theirs, ours) if divergence == "forward" else (ours, theirs)))
    apart = 4 * (p.exp() * (p - q)).sum()
    assert list(sums) == ["labels", "logits"] and apart > 0.01
    torch.testing.assert_close(sums["labels"].double(), label, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums["logits"].double(), apart, rtol=1e-4, atol=0)
    alone = sums_of("logits", *pair, **keys)
    assert list(alone) == ["logits"] and torch.equal(alone["logits"], sums["logits"])
    measured = sums_of("mix", *pair, measured=True, **keys)
    assert torch.equal(measured["labels"], sums["labels"]), "what is measured is the labels"


def test_a_student_that_equals_its_teacher_learns_nothing_of_it(pair: tuple[Any, Any]) -> None:
    student = pair[0]
    sums = sums_of("mix", student, copy.deepcopy(student), temperature=2.0)
    trained = [p for p in student.parameters() if p.requires_grad]
    grads = torch.autograd.grad(sums["logits"], trained, retain_graph=True, allow_unused=True)
    assert float(sums["logits"].detach()) < 1e-6
    assert max(float(g.abs().max()) for g in grads if g is not None) < 1e-6
    labels = torch.autograd.grad(sums["labels"], trained, allow_unused=True)
    assert max(float(g.abs().max()) for g in labels if g is not None) > 1e-2


def test_an_encoder_loses_its_weights_beside_its_own_base(tmp_path: Path) -> None:
    """task: masked_lm, half labels and half the dense base at T = 2, while zeros come."""
    model = encoders.encoder(tmp_path / "model", "bert", AutoModelForMaskedLM)
    rows = encoders.write(tmp_path / "rows.jsonl", encoders.rows(40))
    schedule = {"start": 0, "end": 0.5, "every": 1}
    found = encoders.recipe(
        tmp_path,
        model,
        {"kind": "masked_lm", "mask": 0.4},
        rows,
        quant={
            "bits": 8,
            "group_size": -1,
            "sparsity": {"kind": "magnitude", "amount": 0.75, "schedule": schedule},
        },
        adapter={"method": "full_qat"},
        data={"train": {"path": rows, "format": "text"}},
        train={
            "max_steps": 3,
            "signal": {"kind": "mix", "label_weight": 0.5, "temperature": 2},
            "teacher": "residual",
        },
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(found))
    recipe = load_recipe(file)
    planned = plan(recipe)
    assert planned is not None and any("signal mix, teacher residual" in note for note in planned.notes)
    pipeline.run(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = lines[0]
    assert first["loss"] == pytest.approx((first["labels_loss"] + first["logits_loss"]) / 2, rel=1e-5)
    start = json.loads((tmp_path / "run" / "teacher.json").read_text())["student_kl"]
    assert first["logits_loss"] > 100 * start, "zeros take the model away from its base, which is dense"
    weights = read_weights(tmp_path / "run" / "merged")
    for name in weights:
        zeros = (weights[name].unpack_codes() == 128).double().mean()
        assert zeros >= 0.745, name
