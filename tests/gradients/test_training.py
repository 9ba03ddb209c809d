"""Training by each kind: resumed bit-equal, nothing saved where there is no backward, the same draws in the
forwards that are compared, and what a bad step leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft.adapters.carry import Carried
from lowbit_ft.gradients import GRADIENTS
from lowbit_ft.train.setup import TrainError
from tests.gradients.common import Layer, gradients, making, window
from tests.loop_tools import go as go_toy
from tests.signals.common import STEPS, go, lesson, student
from tests.signals.test_training import lines, stop_at, trained
from tests.toy import Toy

# Every kind, with what it keeps and what begins in the middle of so short a run.
WAYS: dict[str, dict[str, Any]] = {
    "zeroth_order": {
        "kind": "zeroth_order",
        "momentum": 0.5,
        "probes": 2,
        "cage": {"silence": 0.2, "lambda": 1.0},
    },
    "fogzo": {"kind": "fogzo", "start": 0.5, "kappa_end": 5.0, "cage": {"silence": 0.5, "lambda": 0.9}},
    "coupled": {"cage": {"form": "coupled", "unit": "raw", "silence": 0.5, "lambda": 1e-4}},
}


def run(folder: Path, way: dict[str, Any], start: int = 0, kind: str = "labels", **changes: Any) -> Any:
    model = student(start)
    setting = {"gradient": way, "max_grad_norm": 1.0, "eval_every": None} | changes
    go(folder, model, lesson(kind, model), **setting)
    return trained(model)


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_bit_equal(way: str, tmp_path: Path) -> None:
    kind = "mix" if way == "zeroth_order" else "labels"  # its forwards ask the teacher, too
    straight = run(tmp_path / "a", WAYS[way], kind=kind)
    run(tmp_path / "b", WAYS[way], kind=kind, on_step=stop_at(2))
    assert len(lines(tmp_path / "b")) == 3
    if way == "zeroth_order":
        with pytest.raises(TrainError, match="gradient was .*'momentum': 0.5.*'momentum': 0.4"):
            run(tmp_path / "b", WAYS[way] | {"momentum": 0.4}, kind=kind, resume=True)
        assert lines(tmp_path / "a", "logits_loss")
    resumed = run(tmp_path / "b", WAYS[way], start=3, kind=kind, resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight) and len(straight) > 20
    assert lines(tmp_path / "a") == lines(tmp_path / "b") and len(lines(tmp_path / "a")) == STEPS


def test_before_it_begins_a_kind_is_backprop_bit_for_bit(tmp_path: Path) -> None:
    """And dropout draws on as if no more forwards had been: the losses stay those of backprop."""
    options: dict[str, Any] = {"learning_rate": 1e-12, "max_grad_norm": 0.1}
    found = {}
    for way, gradient in (("plain", {}), ("fogzo", WAYS["fogzo"] | {"cage": None})):
        model = student(attention_dropout=0.5)
        go(tmp_path / way, model, lesson("labels", model), gradient=gradient, **options)
        found[way] = [lines(tmp_path / way, key) for key in ("loss", "grad_norm")]
    (losses, norms), (others, weighed) = found["plain"], found["fogzo"]
    assert losses == pytest.approx(others, rel=1e-6) and norms[:2] == weighed[:2]
    assert norms[3] != pytest.approx(weighed[3], rel=1e-3)


def test_zeroth_order_saves_nothing_and_clips_nothing(tmp_path: Path) -> None:
    saved: list[Any] = []

    def keep(tensor: Any) -> Any:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(tmp_path / "none", {"kind": "zeroth_order"}, kind="mix")
        assert not saved
        assert min(lines(tmp_path / "none", "grad_norm")) > 1
        run(tmp_path / "some", {}, max_steps=1)
        assert saved


@pytest.mark.parametrize("kind", ["zeroth_order", "fogzo"])
def test_the_forwards_that_are_compared_draw_alike(kind: str) -> None:
    """A loss of draws alone has no slope, whatever they are; behind it the generator is where one forward of
    each micro-batch leaves it."""
    made = making(Layer(), total=1)
    options = {"kappa_end": 1.0, "start": 0.0} if kind == "fogzo" else {"probes": 2}
    gradient: Any = GRADIENTS[kind](**options).make(made)
    gradient.kappa = lambda step: 1.0
    torch.manual_seed(5)

    def drawn(i: int) -> torch.Tensor:
        return torch.rand(()) + 0 * sum(p.sum() for p in made.trained.values())

    gradient.fill(window(drawn, size=2))
    assert not gradients(made).any()
    after = torch.rand(())
    torch.manual_seed(5)
    for _ in range(2):
        torch.rand(())
    assert torch.equal(after, torch.rand(()))


def test_scales_alone_train_by_zeroth_order_and_a_bad_step_leaves_its_average(tmp_path: Path) -> None:
    """QZO: what is no scale has no gradient. A loss that is NaN is not taken into the average."""
    way = {"kind": "zeroth_order", "scope": "scales", "momentum": 0.9}
    before, after = trained(student()), run(tmp_path / "scales", way)
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"log_scale"}

    class Broken(Toy):
        bad = False

        def forward(self, *args: Any, **inputs: Any) -> Any:
            out = super().forward(*args, **inputs)
            out.logits = out.logits * (float("nan") if self.bad else 1.0)
            return out

    model = Broken()

    def on_step(step: int) -> None:
        model.bad = step == 2

    _, result = go_toy(tmp_path / "bad", model, gradient=way, on_step=on_step, save_every=1, max_steps=4)
    assert result.bad_steps == 1 and all(p.isfinite().all() for p in model.parameters())
    assert all(loss == loss for loss in lines(tmp_path / "bad")) and len(lines(tmp_path / "bad")) == 3


def test_what_a_model_has_not_is_said(tmp_path: Path) -> None:
    for way, said in (
        ({"cage": {}}, "nothing that trains is rounded to codes"),
        ({"kind": "fogzo"}, "nothing that trains is rounded to codes"),
        ({"kind": "zeroth_order"}, "gradient_checkpointing: got true"),
    ):
        with pytest.raises(ValueError, match=said):
            go_toy(tmp_path / "toy", Toy(), gradient=way, gradient_checkpointing="check" in said)


@pytest.mark.parametrize("cage", [None, {}])
def test_the_average_of_gradients_follows_its_rows(cage: dict[str, Any] | None) -> None:
    """ef_qat moves row 0 to row 1: so does what zeroth order keeps of it; a new row begins with nothing."""
    made = making(Layer("full_qat"))
    way = {"kind": "zeroth_order", "momentum": 0.5, "cage": cage}
    gradient = GRADIENTS["zeroth_order"].model_validate(way).make(made)
    (name, delta), *_ = made.trained.items()
    before = torch.arange(1.0, 25.0).view_as(delta)
    gradient.load({name: before.clone()})
    gradient.carry([Carried(delta, torch.tensor([-1, 0, 2]))])
    after = gradient.state()[name]
    assert torch.equal(after, torch.stack([torch.zeros(8), before[0], before[2]]))
