"""attach: what trains, what is frozen, what is refused, and the exchange of adapter states."""

import copy

import pytest
import torch
from torch import nn

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import (
    adapted_layers,
    adapter_state,
    attach,
    base_digest,
    begin_step,
    load_adapter_state,
    packed_layers,
)
from lowbit_ft.grid import BinaryGrid, IntGrid
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.model.linear import PackedLinear
from tests.adapters.common import randomize


class Block(nn.Module):
    def __init__(self, grid):
        super().__init__()
        calibrate = CALIBRATORS["greedy" if isinstance(grid, BinaryGrid) else "mse"].run
        self.norm = nn.LayerNorm(64)
        self.up = PackedLinear(calibrate(torch.randn(96, 64), grid, Stats()), torch.randn(96))
        self.down = PackedLinear(calibrate(torch.randn(64, 96), grid, Stats()))

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def model_of(*grids) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(10, 64), *(Block(grid) for grid in grids), nn.Linear(64, 10))


def grid_for(method: str):
    return BinaryGrid(group_size=32) if ADAPTERS[method].grid_name == "binary" else IntGrid(group_size=32)


@pytest.mark.parametrize("method", ADAPTERS)
def test_only_adapters_train(method: str):
    model = model_of(grid_for(method), grid_for(method))
    table = attach(model, ADAPTERS[method]())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".adapter." in name for name in trainable)
    assert [row.layer for row in table.rows] == ["1.up", "1.down", "2.up", "2.down"]
    assert table.trainable == sum(p.numel() for p in trainable.values())
    assert table.total_parameters == 4 * 64 * 96 + sum(
        p.numel() for p in model.parameters() if not p.requires_grad
    )
    assert f"{table.trainable:,}" in str(table) and "4 layers" in str(table)
    assert table.rows[0].packed_bytes == model[1].up.base.nbytes and table.rows[0].grid == str(
        grid_for(method)
    )

    model(torch.randint(0, 10, (2, 5))).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_attaching_again_replaces_the_adapters():
    model = model_of(IntGrid(group_size=32))
    attach(model, ADAPTERS["lr_qat"]())
    attach(model, ADAPTERS["scale"]())
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"log_scale"}


def test_every_refused_layer_is_named_before_anything_changes():
    model = model_of(IntGrid(group_size=32), IntGrid(group_size=32, residual_bits=0))
    with pytest.raises(ValueError) as refused:
        attach(model, ADAPTERS["l4q"]())
    lines = str(refused.value).splitlines()
    assert "l4q" in lines[0] and [line.split(":")[0].strip() for line in lines[1:]] == ["2.up", "2.down"]
    assert not list(adapted_layers(model)) and all(p.requires_grad for p in model[0].parameters())


def test_errors_at_once():
    with pytest.raises(ValueError, match="no packed layers"):
        attach(nn.Linear(2, 2), ADAPTERS["lr_qat"]())
    with pytest.raises(ValueError, match="set quant.grid: binary"):
        attach(model_of(IntGrid()), ADAPTERS["alpha_tuning"]())
    with pytest.raises(ValueError, match="dense weights"):
        attach(model_of(IntGrid(residual_bits=0)), ADAPTERS["lr_qat"](init="loftq"))


def test_a_start_that_reads_the_dense_weights_asks_for_each_layer_once():
    model, asked = model_of(IntGrid(group_size=32, residual_bits=0)), []

    def dense(name: str) -> torch.Tensor:
        asked.append(name)
        return model.get_submodule(name).base.dequantize() + 0.05

    attach(model, ADAPTERS["lr_qat"](init="loftq", rank=4), dense)
    assert asked == ["1.up", "1.down"]
    assert all(layer.adapter.B.any() for _, layer in adapted_layers(model))
    asked.clear()
    attach(model, ADAPTERS["lr_qat"](), dense)
    assert asked == []


@pytest.mark.parametrize("method", ADAPTERS)
def test_state_round_trip(method: str):
    model = model_of(grid_for(method))
    attach(model, ADAPTERS[method]())
    for _, layer in adapted_layers(model):
        randomize(layer.adapter)
    state = {name: t.clone() for name, t in adapter_state(model).items()}
    assert all(name.startswith("base_model.model.1.") and ".lowbit_adapters." in name for name in state)
    assert len(state) == sum(".adapter." in name for name in model.state_dict())

    other = model_of(grid_for(method))
    attach(other, ADAPTERS[method]())
    load_adapter_state(other, state)
    ids = torch.randint(0, 10, (2, 5))
    assert torch.equal(model(ids), other(ids))


def test_every_problem_of_a_state_is_listed_and_nothing_copied():
    model = model_of(IntGrid(group_size=32))
    attach(model, ADAPTERS["lr_qat"]())
    before = copy.deepcopy(adapter_state(model))
    state = {name: t + 1 for name, t in before.items()}
    missing, misshapen = sorted(state)[:2]
    del state[missing]
    state[misshapen] = torch.zeros(3)
    state["base_model.model.9.up.lowbit_adapters.A"] = torch.zeros(1)
    with pytest.raises(ValueError) as refused:
        load_adapter_state(model, state)
    text = str(refused.value)
    assert f"missing: {missing}" in text and "unknown: base_model.model.9.up" in text
    assert f"{misshapen}: got shape (3,)" in text
    assert all(torch.equal(t, before[name]) for name, t in adapter_state(model).items())


def test_begin_step_reaches_every_adapter():
    model = model_of(IntGrid(group_size=32))
    attach(model, ADAPTERS["l4q"](warmup_steps=2))
    layers = [layer for _, layer in adapted_layers(model)]
    begin_step(model, 0)
    assert all(layer.adapter.warming for layer in layers)
    begin_step(model, 2)
    assert not any(layer.adapter.warming for layer in layers) and all(
        layer.adapter.log_scale.any() for layer in layers
    )


def test_base_digest_is_of_the_base_and_by_name():
    model = model_of(IntGrid(group_size=32))
    digest = base_digest(model)
    attach(model, ADAPTERS["lr_qat"]())
    model.to(torch.bfloat16)
    assert base_digest(model) == digest == base_digest(model_of(IntGrid(group_size=32)).to(torch.bfloat16))
    assert len(list(packed_layers(model))) == 2
    _, layer = next(packed_layers(model))
    layer.codes[0, 0] ^= 1
    changed = base_digest(model)
    layer.codes[0, 0] ^= 1
    assert changed != digest == base_digest(model)
    assert base_digest(nn.Sequential(nn.Identity(), model)) != digest
