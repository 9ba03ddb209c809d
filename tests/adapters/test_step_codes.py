"""train.keep_codes: one grid_codes per weight and optimizer step, void as soon as anything they are made of
changes.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lowbit_kernels
import pytest
import torch
from torch import Tensor

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapted_layers, adapter_state, begin_step, keep_codes
from lowbit_ft.data.batches import Batches
from lowbit_ft.grid import IntGrid
from lowbit_ft.merge import merged_weight
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.train.loop import train
from tests.adapters.common import base_of, trained
from tests.packed_tools import adapted_llama, adapter_config
from tests.toy import examples, quiet, section, state

METHODS = ("lr_qat", "dl_qat", "l4q", "scale")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often grid_codes ran, by the address of the base's codes."""
    calls: Counter[int] = Counter()
    plain = lowbit_kernels.grid_codes

    def counted(codes: Tensor, *rest: Any) -> Tensor:
        calls[codes.data_ptr()] += 1
        return plain(codes, *rest)

    monkeypatch.setattr(lowbit_kernels, "grid_codes", counted)
    monkeypatch.setattr(sys.modules["lowbit_kernels.grid_linear"], "grid_codes", counted)
    return calls


def layer_of(method: str = "lr_qat", **options: Any) -> PackedLinear:
    base = base_of(IntGrid(bits=3, group_size=32, symmetric=False))
    layer = PackedLinear(base)
    layer.adapter = trained(ADAPTERS[method](**({"rank": 4} if method != "scale" else {}), **options), base)
    keep_codes(layer, True)
    return layer.train()


def weight_of(layer: PackedLinear) -> Tensor:
    """What the forward multiplies with, seen through its output."""
    return layer(torch.eye(layer.in_features)).t()


@pytest.mark.parametrize("method", METHODS)
def test_forwards_and_backwards_share_the_codes_and_the_bits(method: str, made: Counter[int]):
    kept, plain = layer_of(method), layer_of(method)
    plain.load_state_dict(kept.state_dict())
    keep_codes(plain, False)
    for layer in (kept, plain):
        for part in torch.randn(2, 5, 200, generator=torch.Generator().manual_seed(3)):
            x = part.clone().requires_grad_()
            layer(x).square().sum().backward()
    assert sum(made.values()) == (
        0 if method == "scale" else 1 + 4
    )  # without: a forward and a backward each, twice
    for a, b in zip(kept.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def writes() -> dict[str, Any]:
    """Ways to change what the codes are made of, none of which tells the slot."""

    def through_optimizer(layer: PackedLinear) -> None:
        layer(torch.randn(3, 200)).sum().backward()
        torch.optim.AdamW(layer.adapter.parameters(), lr=0.5, fused=True).step()

    def through_load(layer: PackedLinear) -> None:
        layer.load_state_dict(
            {name: t + 0.5 if name == "adapter.A" else t for name, t in layer.state_dict().items()}
        )

    @torch.no_grad()
    def by_hand(layer: PackedLinear) -> None:
        layer.adapter.A[0, 0] += 7

    def through_data(layer: PackedLinear) -> None:
        layer.adapter.A.data = layer.adapter.A.data + 1

    def another_parameter(layer: PackedLinear) -> None:
        layer.adapter.B = torch.nn.Parameter(-layer.adapter.B.detach())

    def another_base(layer: PackedLinear) -> None:
        layer.codes = layer.codes.roll(1, 0)

    def base_in_place(layer: PackedLinear) -> None:
        layer.codes.copy_(layer.codes.roll(1, 0))

    def another_scale(layer: PackedLinear) -> None:
        layer.scale.mul_(2)

    return {name: f for name, f in locals().items() if callable(f)}


@pytest.mark.parametrize("method", ["lr_qat", "l4q"])
@pytest.mark.parametrize("how", writes())
def test_whoever_writes_makes_them_void(how: str, method: str):
    layer = layer_of(method)
    before = weight_of(layer).detach()
    assert torch.equal(weight_of(layer), before) and layer.adapter.kept.codes is not None
    writes()[how](layer)
    after = weight_of(layer).detach()
    assert torch.equal(after, merged_weight(layer).dequantize()) and not torch.equal(after, before)


def test_a_foreign_writer_is_answered_by_the_end_of_the_step():
    """A kernel that is given a raw pointer leaves no trace; dropping at the end of the step needs none."""
    layer = layer_of()
    weight_of(layer)
    layer.adapter.A.detach().numpy()[0, 0] += 7
    begin_step(layer, 1)
    assert layer.adapter.kept.codes is None
    assert torch.equal(weight_of(layer), merged_weight(layer).dequantize())


def test_only_training_forwards_keep_and_use_them(made: Counter[int]):
    layer = layer_of()
    with torch.no_grad():
        weight_of(layer)
    layer.eval()
    weight_of(layer)
    with torch.inference_mode():
        layer.train()
        weight_of(layer)
    assert layer.adapter.kept.codes is None and sum(made.values()) == 3
    weight_of(layer)
    poisoned = layer.adapter.kept.codes
    poisoned.fill_(-1)  # if eval or merge read it, they would show it
    layer.eval()
    assert torch.equal(weight_of(layer), merged_weight(layer).dequantize())
    assert not (merged_weight(layer).codes == -1).all()


def test_they_are_no_state(tmp_path: Path):
    layer = layer_of()
    names = set(layer.state_dict())
    weight_of(layer)
    assert set(layer.state_dict()) == names and set(adapter_state(layer)) == {
        n for n in adapter_state(layer_of())
    }
    assert copy.deepcopy(layer).adapter.kept.codes is None
    assert (
        pickle.loads(pickle.dumps(layer.adapter.kept)).codes is None
    )  # as a spawned data loader would send it
    hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks
    assert hooks, "nobody listens to optimizers"
    keep_codes(layer, False)
    gc.collect()
    assert layer.adapter.kept is None and not hooks, "a slot that is gone still listens"


# ---------------------------------------------------------------- in the training loop


def llama(method: str, **options: Any) -> Any:
    grid = IntGrid(bits=3, group_size=32, residual_bits=4)
    return adapted_llama(adapter_config(method, rank=3, **options), grid)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_makes_them_once_per_weight_and_step(
    method: str, checkpointing: bool, tmp_path: Path, made: Counter[int]
):
    """Two micro-batches a step, an evaluation and a checkpoint between steps: the same bytes trained, the
    same losses.
    """
    found, counts = [], []
    for keep in (False, True):
        model, folder = llama(method), tmp_path / str(keep)

        def on_step(step: int, model: Any = model) -> None:
            if step == 0:
                made.clear()  # before it a few tokens try out how the model can attend
            begin_step(model, step)

        train(
            model,
            Batches(examples(11), 2, 0, 0),
            None,
            section(max_steps=4, gradient_checkpointing=checkpointing, keep_codes=keep, save_every=2),
            folder,
            on_step=on_step,
            console=quiet(),
        )
        counts.append(made.copy())
        assert all(layer.adapter.kept is None for _, layer in adapted_layers(model))
        codes = {name: merged_weight(layer).digest() for name, layer in adapted_layers(model)}
        loss = [line for line in (folder / "metrics.jsonl").read_text().splitlines()]
        files = [
            sorted(p.name for p in step.iterdir()) for step in sorted((folder / "checkpoints").iterdir())
        ]
        found.append((state(model), codes, [json.loads(line)["loss"] for line in loss], files))
    assert found[0][0].keys() == found[1][0].keys()
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])
    assert found[0][1:] == found[1][1:]
    if method != "scale":
        micro = 2 * 4
        # The first layer's input has no gradient, and a recomputation stops at the last layer's input.
        assert (
            min(counts[0].values()) >= micro
            and max(counts[0].values()) == micro * (2 + checkpointing)
            and len(counts[0]) == 14
        )
        assert set(counts[1].values()) == {4} and len(counts[1]) == 14
    else:
        assert not counts[0] and not counts[1], "nothing moves the codes: nobody has to make them"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_with_drawn_tokens_resumes_bit_equal(checkpointing: bool, tmp_path: Path):
    """The draws come from the generator that checkpoints keep; without it the second half would draw other
    tokens.
    """
    cheap = {"low_rank_gradient": "corrected", "scale_grad_tokens": 0.3}

    def run(folder: str, seed: int = 0, stop: bool = False, resume: bool = False) -> Any:
        model = llama("lr_qat", **cheap)
        data = Batches(examples(11), 2, 0, 0)
        on_step = (lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None) if stop else None
        train(
            model,
            data,
            None,
            section(max_steps=4, gradient_checkpointing=checkpointing, keep_codes=True, seed=seed),
            tmp_path / folder,
            on_step=on_step,
            resume=resume,
            console=quiet(),
        )
        return state(model)

    straight = run("straight")
    run("halves", stop=True)
    torch.manual_seed(99)
    resumed, other = run("halves", resume=True), run("other", seed=1)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert any(not torch.equal(straight[name], other[name]) for name in straight), (
        "the seed does not reach the draws"
    )


def test_an_optimizer_that_writes_past_the_versions_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What bitsandbytes does: the step changes memory that no version counter knows."""

    def sly(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.detach().numpy().__isub__(0.1 * p.grad.numpy())

    monkeypatch.setattr(torch.optim.AdamW, "step", torch.optim.Optimizer.profile_hook_step(sly))
    runs = []
    for keep in (False, True):
        model = llama("lr_qat")
        train(
            model,
            Batches(examples(11), 2, 0, 0),
            None,
            section(max_steps=3, keep_codes=keep),
            tmp_path / str(keep),
            console=quiet(),
        )
        runs.append(state(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(runs[0][name], value) for name, value in state(llama("lr_qat")).items())
