"""ef_qat in the loop: rows that are chosen anew while it trains, and a run that is stopped around that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapted_layers, adapter_state, begin_step
from lowbit_ft.adapters.ef_qat import EfQAT
from lowbit_ft.gradients import GRADIENTS
from lowbit_ft.grid import IntGrid
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.train.refusals import refuse
from lowbit_ft.train.setup import TrainError
from lowbit_ft.train.sharding import unshardable
from tests.gradients.common import making, window
from tests.loop_tools import digest, go, losses, stop_at
from tests.packed_tools import adapted_llama, adapter_config
from tests.toy import batches, section

EVERY = 2


def llama(seed: int = 1, **options: Any) -> Any:
    keys = {"share": 0.25, "refresh_steps": EVERY} | options
    model = adapted_llama(adapter_config("ef_qat", **keys), IntGrid(bits=2, group_size=32), seed=seed)
    return model


def run(folder: Path, model: Any, at: int | None = None, **changes: Any) -> Any:
    def on_step(step: int) -> Any:
        if at is not None:
            stop_at(at)(step)
        return begin_step(model, step)

    keys = {"max_steps": 6, "learning_rate": 0.3} | changes
    go(folder, model, batches(), on_step=on_step, **keys)
    return model


def equal(a: Any, b: Any) -> bool:
    x, y = adapter_state(a), adapter_state(b)
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


@pytest.mark.parametrize(
    ("importance", "at", "master"),
    [("weight", 3, "fp32"), ("weight_input", 4, "bf16"), ("weight", 4, "none")],
)
def test_a_run_resumes_bit_equal_across_a_choice_of_rows(
    importance: str, at: int, master: str, tmp_path: Path
) -> None:
    """Stopped right before the second choice, or after it: rows, what left, averages."""
    keys: dict[str, Any] = {"importance": importance, "master": master}
    straight = run(tmp_path / "a", llama(**keys))
    on = [layer.adapter for _, layer in adapted_layers(straight)]
    gone = [len(adapter.left) for adapter in on if isinstance(adapter, EfQAT)]
    assert sum(gone) > 4, "no row left: nothing was looked at"
    run(tmp_path / "b", llama(**keys), at)
    again = run(tmp_path / "b", llama(seed=2, **keys), resume=True)
    assert equal(straight, again) and digest(tmp_path / "a", 6) == digest(tmp_path / "b", 6)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("importance", ["weight", "weight_input"])
def test_zeroth_order_sees_inputs_and_its_average_follows_the_rows(importance: str) -> None:
    model = llama(importance=importance).train()
    made = making(model, only=("delta",))
    gradient: Any = GRADIENTS["zeroth_order"](momentum=0.9).make(made)  # pyright: ignore[reportCallIssue]
    ids = torch.arange(12)[None]
    begin_step(model, 0)
    gradient.fill(window(lambda i: model(input_ids=ids).logits.float().square().sum()))
    gradient.after_step(window(lambda i: torch.zeros(())), {})
    on = {n: m for n, m in model.named_modules() if isinstance(m, EfQAT)}
    if importance == "weight_input":
        assert all(adapter.input_size.all() for adapter in on.values())
    for adapter in on.values():
        with torch.no_grad():
            adapter.log_scale[:, adapter.rows[:3]] -= 20.0
    before = {n: (a.rows.clone(), gradient.average[f"{n}.delta"].clone()) for n, a in on.items()}
    gradient.carry(begin_step(model, 1 if importance == "weight_input" else EVERY))
    for name, adapter in on.items():
        rows, old = before[name]
        kept = {int(row): value for row, value in zip(rows, old, strict=True)}
        want = [kept.get(int(row), torch.zeros_like(old[0])) for row in adapter.rows]
        assert not torch.equal(rows, adapter.rows)
        assert torch.equal(gradient.average[f"{name}.delta"], torch.stack(want))


def test_what_cannot_move_rows_is_refused_with_the_way_out() -> None:
    config = ADAPTERS["ef_qat"].model_validate({"method": "ef_qat", "refresh_steps": 5})
    [(key, message)] = unshardable(section(), config)
    assert key == ("adapter", "refresh_steps") and "refresh_steps: null" in message
    assert not unshardable(section(), ADAPTERS["ef_qat"].model_validate({"method": "ef_qat"}))
    with pytest.raises(TrainError, match=r"adapter.refresh_steps: got 2 with train.sharding: fsdp"):
        refuse(section(), llama(), None, sharded=True)
    way = {"kind": "zeroth_order", "scope": "scales"}
    [(key, message)] = unshardable(section(), adapter_config("full_qat", master="none"))
    assert key == ("adapter", "master") and "set master: fp32" in message
    with pytest.raises(TrainError, match=r"gradient.scope: got 'scales' with adapter ef_qat"):
        refuse(section(gradient=way), llama(), None, sharded=False)


def test_validation_goes_by_the_op_that_training_takes(tmp_path: Path) -> None:
    model, seen = llama(refresh_steps=None), []
    layer = next(m for m in model.modules() if isinstance(m, PackedLinear))
    layer.register_forward_pre_hook(lambda layer, _: seen.append((layer.training, layer.fast_decode)))
    go(tmp_path, model, batches(), batches(seed=1), max_steps=1, eval_every=1)
    behind = seen[seen.index((True, True)) :]
    assert set(behind) == {(True, True), (False, False)} and layer.fast_decode
