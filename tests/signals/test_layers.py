"""Learning from the layers of a teacher: what is compared, what an intervention puts in and cuts off, and
when; of encoders and of a language model."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lowbit_ft.adapters.attach import attach
from lowbit_ft.grid import IntGrid
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.maps import SEAT, why_no_maps
from lowbit_ft.model.parts import layer_parts
from lowbit_ft.signals import SIGNALS, Lesson, OtherModel
from lowbit_ft.signals.intervention import MODES, PLACES, ends, place_at
from lowbit_ft.tasks import TASKS
from lowbit_ft.tasks.labelled import Labels
from tests import encoders
from tests.encoders import KINDS
from tests.packed_tools import adapter_config, random_weight, set_packed
from tests.signals.common import options

TASK: Any = TASKS["sequence_classification"].model_validate(
    {"kind": "sequence_classification", "labels": ["red", "blue"]}
)
IDS = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) < torch.tensor([7, 5, 6])[:, None]).long()


def encoder(kind: str = "bert") -> Any:
    """A packed classifier with full_qat on its layers, moved from its start, in eval mode."""
    torch.manual_seed(0)
    config = KINDS[kind]()
    config.num_labels = 2
    model = AutoModelForSequenceClassification.from_config(config)
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layer" in f".{n}"]
    grid = IntGrid(bits=3, group_size=32)
    weights = {
        n: random_weight(tuple(model.get_submodule(n).weight.shape), grid, seed=i)
        for i, n in enumerate(found)
    }
    for weight in weights.values():
        weight.scale.mul_(8)  # of the size that attention is no longer even
    attach(set_packed(model, weights), adapter_config("full_qat"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "classifier" in name and parameter.shape[0] == 2:
                parameter.mul_(20)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def stepped(
    model: Any, teacher: Any, step: int = 0, **changes: Any
) -> tuple[dict[str, Tensor], set[str], Any]:
    """(sums by part, names of what has a gradient, the lesson) of one training forward and backward; the
    lesson has all that a step leaves in it."""
    section = options("layers", **changes)
    lesson = Lesson(SIGNALS["layers"], section, OtherModel(teacher, {"teacher": "checkpoint"}))
    with ExitStack() as stack:
        stack.enter_context(TASK.goal.attention(model, lesson))
        forward = MethodType(TASK.goal.forward(model, None, lesson, stack), model)
        assert lesson.lockstep is not None
        lesson.at(step, 4, 0)
        labels = Labels({"labels": torch.tensor([0, 1, 0])})
        sums = forward(input_ids=IDS, attention_mask=MASK, labels=labels)
        sums.sum().backward()
        idle = {n for n, p in model.named_parameters() if any(p is q for q in lesson.idle)}
        measured = forward(input_ids=IDS, attention_mask=MASK, labels=Labels(labels.values, measured=True))
        plain = TASK.loss(model(input_ids=IDS, attention_mask=MASK, use_cache=False), labels.values)
        torch.testing.assert_close(measured[0], plain)  # nobody intervenes where it is measured
    grads = {n for n, p in model.named_parameters() if p.grad is not None}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert grads == trained - idle
    model.zero_grad()
    assert not any(SEAT in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in layers_of(model))
    return dict(zip(lesson.parts, sums.detach(), strict=True)), idle, lesson


def layers_of(model: Any) -> list[nn.Module]:
    return [module for part in layer_parts(model) for module in part.layer.modules()]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    student = encoder()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for layer in teacher.modules():
            if isinstance(layer, PackedLinear) and layer.adapter is not None:
                layer.adapter.delta.add_(torch.randn_like(layer.adapter.delta))
    return student, teacher.requires_grad_(False)


def by_hand(model: Any) -> dict[str, list[Tensor]]:
    """The hidden states, scores and attention outputs of a BERT, from transformers' forward and hooks."""
    found: dict[str, list[Tensor]] = {"hidden": [], "scores": [], "outputs": []}
    heads = model.config.num_attention_heads
    handles = []
    for one in layer_parts(model):
        kept: dict[str, Tensor] = {}

        def split(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

        for role, module in one.reads:
            handles.append(module.register_forward_hook(lambda m, a, out, r=role, k=kept: k.update({r: out})))

        def leave(m: Any, a: Any, out: Any, k: dict[str, Tensor] = kept) -> None:
            q, key = split(k["q"]), split(k["k"])
            found["scores"].append(q @ key.transpose(2, 3) / q.shape[-1] ** 0.5)
            found["hidden"].append(out[0] if isinstance(out, tuple) else out)

        handles.append(one.layer.register_forward_hook(leave))
        handles.append(one.block.register_forward_hook(lambda m, a, out: found["outputs"].append(out[0])))
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK)
    for handle in handles:
        handle.remove()
    return found


def test_the_parts_are_the_equations(pair: tuple[Any, Any]) -> None:
    """In float64, from transformers' own forward of both: means over what is no padding, over the layers."""
    student, teacher = pair
    ours, theirs = by_hand(student), by_hand(teacher)
    sums, idle, _ = stepped(student, teacher, losses={"logits": 1, "hidden": 2})
    assert not idle
    real = MASK.bool()
    for name, found in sums.items():
        if name == "logits":
            continue
        want = 0.0
        for s, t in zip(ours[name], theirs[name], strict=True):
            off = (s.double() - t.double()) ** 2
            if name == "scores":
                seen = real[:, None, None, :].expand(off.shape)
                off = ((off * seen).sum(-1) / seen.sum(-1)).mean(1)
            else:
                off = off.mean(-1)
            want += float(off[real].sum()) / len(ours[name])
        assert float(found) == pytest.approx(want, rel=1e-4), name
        assert want > 0.01
    with torch.no_grad():
        logits = [m(input_ids=IDS, attention_mask=MASK).logits.double().log_softmax(-1) for m in pair]
    want = float((logits[1].exp() * (logits[1] - logits[0])).sum())
    assert float(sums["logits"]) == pytest.approx(want, rel=1e-4)


def test_who_learns_in_which_place_is_the_paper_s_table(pair: tuple[Any, Any]) -> None:
    student, teacher = pair
    for place in PLACES:
        chosen = {"mode": place, "share": 1}
        _, idle, _ = stepped(student, teacher, intervention=chosen)
        silent = {"map": (), "context": ("value",), "output": ("value", "attention.output.dense")}[place]
        trained = {n for n, p in student.named_parameters() if p.requires_grad}
        assert idle == {n for n in trained if any(f".{s}.adapter" in n for s in silent)}, place
        # With the scores left out, q and k have nothing to learn from either; the path of the task is cut.
        _, deaf, _ = stepped(student, teacher, intervention=chosen, losses={"scores": 0})
        assert deaf == idle | {n for n in trained if ".query." in n or ".key." in n}


def test_what_is_put_in_is_the_teacher_s(pair: tuple[Any, Any]) -> None:
    """A student whose attention is the teacher's in the place that is replaced: a broken q, v or output
    matrix of the student's changes nothing of what it says."""
    student, teacher = pair
    broken = {"map": "query", "context": "value", "output": "attention.output.dense"}
    for place, name in broken.items():
        before, _, _ = stepped(student, teacher, intervention={"mode": place, "share": 1})
        hurt = copy.deepcopy(student)
        for layer in hurt.bert.encoder.layer:
            with torch.no_grad():
                module = layer.get_submodule(name if "." in name else f"attention.self.{name}")
                module.adapter.delta.add_(3)
        after, _, _ = stepped(hurt, teacher, intervention={"mode": place, "share": 1})
        free, _, _ = stepped(hurt, teacher)
        assert torch.equal(before["logits"], after["logits"]) and torch.equal(
            before["hidden"], after["hidden"]
        )
        assert free["logits"] != after["logits"]
        assert bool(after["scores"] != before["scores"]) == (place == "map"), "its own are what is compared"


def test_the_schedule_is_a_function_of_the_step() -> None:
    def places(mode: str, total: int = 24, **more: Any) -> list[Any]:
        section = options("layers", intervention={"mode": mode, **more})
        return [place_at(section, step, total, 3) for step in range(total)]

    assert places("gradual") == ["output"] * 2 + ["context"] * 2 + ["map"] * 8 + [None] * 12
    assert places("inverted", share=1) == ["map"] * 8 + ["context"] * 8 + ["output"] * 8
    assert places("gradual", boundaries=["1/2", 0.75], share=1)[11:13] == ["output", "context"]
    drawn = places("stochastic", share="3/4")
    assert (
        set(drawn[:18]) == set(PLACES)
        and drawn[18:] == [None] * 6
        and drawn == places("stochastic", share=0.75)
    )
    assert all(places(mode, share=1) == [mode] * 24 for mode in PLACES)
    assert ends(options("layers"), 24) == 0 and set(MODES) == {"gradual", "inverted", "stochastic", *PLACES}


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_that_can_and_what_the_others_are_told(kind: str) -> None:
    """Every encoder against itself: nothing to learn, and nothing changed by an intervention."""
    model = encoder(kind)
    teacher = copy.deepcopy(model).requires_grad_(False)
    if kind == "deberta-v2":
        assert "in code of its own" in why_no_maps(model)
        with pytest.raises(ValueError, match="DebertaV2.*in code of its own"):
            stepped(model, teacher)
        changes: dict[str, Any] = {"losses": {"scores": 0}, "intervention": {"mode": "output", "share": 1}}
    else:
        changes = {"intervention": {"mode": "context", "share": 1}}
    sums, _, _ = stepped(model, teacher, **changes)
    assert len(sums) == (3 if kind == "deberta-v2" else 4) and not any(sums.values())
    if kind == "modernbert":
        with pytest.raises(ValueError, match="one matrix makes all three; set mode: output or context"):
            stepped(model, teacher, intervention={"mode": "gradual"})
    if kind == "bert":
        shallow = encoders.KINDS["bert"]()
        shallow.num_hidden_layers = 1
        other = AutoModelForSequenceClassification.from_config(shallow)
        with pytest.raises(ValueError, match="has 1 layers, and the model 2"):
            stepped(model, other)
