"""What two detectors say of the same queries: the equations, the law, and the choice of a teacher."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection

from lowbit_ft.tasks import TASKS
from lowbit_ft.tasks.queries import followed, kept, queries_apart
from lowbit_ft.tasks.states import hidden_apart, states_of
from tests import detectors

KINDS = ("rt_detr", "d_fine", "detr", "yolos")
SOFTMAX = ("detr", "yolos")
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = [
    {
        "class_labels": torch.tensor([0, 2]),
        "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.4]]),
    },
    {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]])},
]
TASK: Any = TASKS["object_detection"].model_validate({"kind": "object_detection", "labels": detectors.LABELS})


def pair(kind: str) -> tuple[Any, Any]:
    """A detector that trains, its batch norms at rest, and a teacher that was moved from it."""
    torch.manual_seed(0)
    config = detectors.config_of(kind)
    student: Any = AutoModelForObjectDetection.from_config(config, attn_implementation="eager")
    teacher = copy.deepcopy(student).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    student.train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return student, teacher


def ask(student: Any, teacher: Any, **inputs: Any) -> tuple[Any, Any]:
    """(outputs of the teacher, of the student)."""

    def taught() -> Any:
        with torch.no_grad():
            return teacher(pixel_values=IMAGES, output_hidden_states=True)

    said = TASK.beside(taught, lambda: student(pixel_values=IMAGES, output_hidden_states=True, **inputs))
    return said[0], said[1]


def plainly(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], softmax: bool, T: float) -> float:
    """Of one level, in float64, query by query: a the teacher's, b the model's (logits, boxes)."""
    total = 0.0
    for z, w, x, y in zip(
        *(t.detach().double().flatten(0, 1) for t in (a[0], b[0], a[1], b[1])), strict=True
    ):
        if softmax:
            p, q = (v.div(T).softmax(-1) for v in (z, w))
            total += T**2 * float((p * (p / q).log()).sum())
            sure = float(1 - z.softmax(-1)[-1])
        else:
            for i in range(len(z)):
                p, q = (torch.stack([v[i].div(T).sigmoid(), (-v[i]).div(T).sigmoid()]) for v in (z, w))
                total += T**2 * float((p * (p / q).log()).sum())
            sure = float(z.sigmoid().max())
        total += 5 * sure * float((x - y).abs().sum())
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_the_equation_the_law_and_the_queries(kind: str) -> None:
    """With labels too, where RT-DETR and D-FINE have noisy queries before their own."""
    student, teacher = pair(kind)
    theirs, ours = ask(student, teacher, labels=LABELS)
    softmax, queries = kind in SOFTMAX, 8
    assert theirs.logits.shape == (2, queries, 4 if softmax else 3)
    if not softmax:
        assert ours.logits.shape[1] > queries, "noisy copies of the boxes"
        right, mine = (
            [
                (o.intermediate_logits[:, i, -queries:], o.intermediate_reference_points[:, i, -queries:])
                for i in range(o.intermediate_logits.shape[1])
            ]
            for o in (theirs, ours)
        )
        assert (len(right), len(mine)) == ((2, 2) if kind == "rt_detr" else (1, 3))
        pairs = list(zip(right if len(right) > 1 else right * 3, mine, strict=True))
        pairs.append(
            (
                (theirs.enc_outputs_class, theirs.enc_outputs_coord_logits.sigmoid()),
                (ours.enc_outputs_class, ours.enc_outputs_coord_logits.sigmoid()),
            )
        )
    else:
        pairs = [((theirs.logits, theirs.pred_boxes), (ours.logits, ours.pred_boxes))]
    want = sum(plainly(a, b, softmax, 2.0) for a, b in pairs) / len(pairs)
    found = TASK.between(ours, theirs, {}, 2.0)
    assert want > 0.05
    torch.testing.assert_close(found.item(), want, rtol=1e-4, atol=1e-6)

    # the law: who says what the teacher says has nothing to learn, of its states either
    same = copy.deepcopy(teacher).requires_grad_(True)
    theirs, ours = ask(same, teacher)
    both = (TASK.between(ours, theirs, {}), hidden_apart(states_of(ours), states_of(theirs)))
    for value in both:
        grads = torch.autograd.grad(value, list(same.parameters()), retain_graph=True, allow_unused=True)
        assert float(value.detach()) < 1e-6
        assert max(float(g.abs().max()) for g in grads if g is not None) < 1e-5


@pytest.mark.parametrize("kind", ["rt_detr", "d_fine"])
def test_the_model_answers_about_what_its_teacher_chose(kind: str) -> None:
    student, teacher = pair(kind)
    choices: list[Tensor] = []
    with torch.no_grad(), kept(choices):
        teacher(pixel_values=IMAGES)
    own: list[Tensor] = []
    with torch.no_grad(), kept(own):
        alone = student(pixel_values=IMAGES)
    assert len(choices) == len(own) == 1 and not torch.equal(choices[0], own[0])
    with torch.no_grad(), followed(choices):
        said = student(pixel_values=IMAGES)
    torch.testing.assert_close(said.enc_outputs_class, alone.enc_outputs_class)
    chosen = said.enc_outputs_class.gather(1, choices[0][..., None].expand(-1, -1, 3))
    assert torch.equal(said.enc_topk_logits, chosen)
    again = student(pixel_values=IMAGES)
    torch.testing.assert_close(again.logits, alone.logits, msg="outside it chooses itself")


def test_hidden_states_are_a_mean_over_numbers_and_states() -> None:
    student, teacher = pair("rt_detr")
    theirs, ours = ask(student, teacher, labels=LABELS)
    mine, right = states_of(ours), states_of(theirs)
    assert [tuple(s.shape[1:]) for s in right] == [
        *[(16, 4, 4)] * 2,
        *[(16, 8, 8), (16, 4, 4)],
        *[(8, 16)] * 3,
    ], "of the encoder, its maps, and of the decoder"
    assert mine[-1].shape[1] > 8
    mine[4:] = [state[:, -8:] for state in mine[4:]]
    want = sum(
        float((a.detach().double() - b.double()).square().mean((1, 2) if a.dim() == 3 else (1, 2, 3)).sum())
        for a, b in zip(mine, right, strict=True)
    ) / len(right)
    torch.testing.assert_close(hidden_apart(states_of(ours), right).item(), want, rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="same depth and width, or set kind: logits"):
        hidden_apart(mine[1:], right)
    with pytest.raises(ValueError, match="same depth and width"):
        hidden_apart([mine[0][:, :8], *mine[1:]], right)


def test_a_teacher_of_other_queries_or_classes_is_refused() -> None:
    student, teacher = pair("detr")
    theirs, ours = ask(student, teacher)
    theirs.logits = theirs.logits[..., :3]
    with pytest.raises(ValueError, match=r"says \[8, 3\].*the model \[8, 4\].*same queries and classes"):
        queries_apart(ours, theirs, softmax=True)
    student, teacher = pair("rt_detr")
    with torch.no_grad(), kept(choices := []):
        teacher(pixel_values=IMAGES)
    for wrong in ([choices[0][:, :5]], []):
        with pytest.raises(ValueError, match=r"chooses (5|no) queries where the model chooses 8 of 80"):
            with followed(wrong):
                student(pixel_values=IMAGES)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.data())
def test_any_choice_is_followed(rows: int, places: int, data: st.DataObject) -> None:
    """The values are those of the scores at the places, with their gradient; other topks are left alone."""
    count = data.draw(st.integers(1, places))
    scores = torch.randn(rows, places, requires_grad=True)
    choice = torch.stack([torch.randperm(places)[:count] for _ in range(rows)])
    with followed([choice]):
        values, found = torch.topk(scores, count, dim=1)
        other = torch.rand(rows, 2, places).topk(count, dim=-1)
    assert torch.equal(found, choice) and torch.equal(values, scores.gather(1, choice))
    assert other.indices.shape == (rows, 2, count)
    (slope,) = torch.autograd.grad(values.sum(), scores)
    assert torch.equal(slope, torch.zeros_like(scores).scatter(1, choice, 1.0))
