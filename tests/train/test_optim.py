"""Optimizers by name, two groups, the learning-rate curve, and their state to safetensors and back."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from lowbit_ft.plan.stages import optimizer_state as planned_state
from lowbit_ft.train.optim import (
    build_optimizer,
    load_optimizer_state,
    lr_factor,
    optimizer_state,
    set_learning_rates,
)
from lowbit_ft.train.optimizers import OPTIMIZERS
from lowbit_ft.train.schedulers import SCHEDULERS
from tests.toy import section


def parameters(seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"layer.adapter.A": (64, 80), "layer.adapter.B": (80, 8), "layer.adapter.log_scale": (40, 2)}
    return [(name, nn.Parameter(torch.randn(*shape, generator=g))) for name, shape in shapes.items()]


def step(optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape, generator=g)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_steps_and_resumes_bit_equal(name: str) -> None:
    """Three steps in a row equal two steps, state through safetensors bytes, a fresh optimizer, and one
    more.
    """
    config = section(optimizer=name, learning_rate=1e-3)
    straight = parameters()
    before = [p.detach().clone() for _, p in straight]
    optimizer = build_optimizer(straight, config)
    for seed in range(2):
        step(optimizer, straight, seed)
    assert all(not torch.equal(a, p) for a, (_, p) in zip(before, straight, strict=True))
    tensors, numbers = optimizer_state(optimizer, {p: n for n, p in straight})
    resumed = [(n, nn.Parameter(p.detach().clone())) for n, p in straight]
    other = build_optimizer(resumed, config)
    load_optimizer_state(other, {p: n for n, p in resumed}, load(save(tensors)), numbers)
    step(optimizer, straight, 2)
    step(other, resumed, 2)
    for (_, a), (_, b) in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_bytes_of_every_state_are_those_of_plan(name: str) -> None:
    """Counted on what bitsandbytes really made: states of the width asked for, one scale per 256 values of 8
    bits and a table of 256.
    """
    parameter = nn.Parameter(torch.ones(64, 1024))
    optimizer = build_optimizer([("layer.adapter.A", parameter)], section(optimizer=name))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    counted = sum(t.nbytes for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor))
    more = 4 if name.startswith(("lamb", "lars")) else 0  # the norm of the update
    less = 1024 if "ademamix8bit" in name else 0  # its two fast and slow averages share a table
    assert counted - more == sum(planned_state(name, [parameter.numel()])) - less


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_an_optimizer_that_cannot_run_here_is_said_before_the_first_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import bitsandbytes

    def broken(*_: Any, **__: Any) -> None:
        raise NameError("name 'str2optimizer8bit_blockwise' is not defined")

    large = [("layer.adapter.A", nn.Parameter(torch.ones(128, 1024)))]
    with pytest.raises(
        ValueError, match="'paged_ademamix' does not run on cpu"
    ):  # bitsandbytes 0.50: pages need a GPU from this size on
        build_optimizer(large, section(optimizer="paged_ademamix"))
    build_optimizer(large, section(optimizer="paged_adamw8bit"))
    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", broken)
    with pytest.raises(
        ValueError,
        match=r"'adamw8bit' does not run on cpu \(NameError: .*\); install .* or set optimizer: adamw",
    ):
        build_optimizer(parameters(), section(optimizer="adamw8bit"))
    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", lambda self: None)
    with pytest.raises(ValueError, match="'adamw8bit' changes nothing on cpu"):
        build_optimizer(parameters(), section(optimizer="adamw8bit"))


def test_adamw_is_torch_adamw() -> None:
    named, copies = parameters(), parameters()
    ours = build_optimizer(named, section(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6, learning_rate=0.01))
    rows = [{"params": [p for _, p in copies[:2]]}, {"params": [copies[2][1]], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(rows, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    for seed in range(3):
        step(ours, named, seed)
        step(theirs, copies, seed)
    for (_, a), (_, b) in zip(named, copies, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert ours.defaults["fused"]


def test_two_groups_with_their_own_rates() -> None:
    optimizer = build_optimizer(
        parameters(), section(learning_rate=0.01, scale_learning_rate=0.5, weight_decay=0.1)
    )
    low, scale = optimizer.param_groups
    assert [p.shape for p in scale["params"]] == [(40, 2)] and len(low["params"]) == 2
    assert (low["weight_decay"], scale["weight_decay"]) == (0.1, 0.0)
    assert set_learning_rates(optimizer, 0.1) == {"lr": pytest.approx(0.001), "scale_lr": pytest.approx(0.05)}
    assert (low["lr"], scale["lr"]) == (pytest.approx(0.001), pytest.approx(0.05))


def test_scale_rate_defaults_to_the_rate_and_one_group_is_enough() -> None:
    optimizer = build_optimizer(parameters()[2:], section(learning_rate=0.02))
    assert set_learning_rates(optimizer, 1.0) == {"scale_lr": 0.02}


def curve(total: int = 100, **changes: Any) -> list[float]:
    return [lr_factor(section(max_steps=total, **changes), s, total) for s in range(total)]


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_curves(scheduler: str) -> None:
    rates = curve(scheduler=scheduler, warmup_ratio=0.1, min_lr_ratio=0.2, decay_ratio=0.3)
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == rates[10] == 1.0
    after = rates[10:]
    assert all(a >= b for a, b in zip(after, after[1:], strict=False))
    if scheduler == "constant":
        assert min(after) == 1
    else:
        assert 0.2 < after[-1] < 0.24
    if scheduler == "wsd":
        assert rates[70] == 1.0 > rates[71]
    if scheduler == "cosine":
        assert rates[55] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2)
    if scheduler == "linear":
        assert rates[55] == pytest.approx(0.6)


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_short_runs_always_learn(scheduler: str, warmup: float, total: int) -> None:
    rates = curve(total, scheduler=scheduler, warmup_ratio=warmup)
    assert all(0 <= rate <= 1 for rate in rates) and rates[0] > 0


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'adamw8bits'; allowed: adamw, .*did you mean 'adamw8bit'"):
        section(optimizer="adamw8bits")
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer([], section())
    with pytest.raises(ValueError, match="'step'; allowed: linear"):
        section(scheduler="step")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes, or set optimizer: adamw"):
        build_optimizer(parameters(), section(optimizer="lion8bit"))
