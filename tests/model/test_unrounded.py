"""unrounded: codes + residual are the weight before rounding, whatever hangs on the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.grid import BinaryGrid, IntGrid, PackedWeight
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.model.linear import PackedEmbedding, PackedLinear
from lowbit_ft.model.unrounded import unrounded
from tests.packed_tools import random_weight

GRIDS = [
    IntGrid(bits=bits, group_size=group, symmetric=symmetric, residual_bits=rest)
    for bits, group, symmetric, rest in [
        (2, 64, True, 4),
        (3, 32, False, 2),
        (4, -1, False, 1),
        (4, 128, True, 4),
        (8, 64, True, 1),
    ]
]


def dense(n: int = 13, k: int = 200) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(3)) * 0.05


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_weight_comes_back_to_bits_and_residual_bits(grid: IntGrid) -> None:
    """minmax clips nothing, so what is left is half a step of the finer grid, and the equation in float64."""
    weight = dense()
    base = CALIBRATORS["absmax" if grid.symmetric else "minmax"].run(weight, grid, Stats())
    assert isinstance(base, PackedWeight) and base.residual is not None
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    step = base.scale.t().double().repeat_interleave(size, dim=1)[:, : weight.shape[1]]
    error = (base.dequantize_unrounded().double() - weight.double()).abs()
    fine = step / (1 << grid.residual_bits) / 2
    inside = (base.dequantize().double() - weight.double()).abs() <= step / 2  # not clipped
    assert bool((error[inside] <= fine[inside] * (1 + 1e-4)).all()) and inside.float().mean() > 0.9
    assert error.mean() < (base.dequantize() - weight).abs().mean() / (1 << grid.residual_bits) * 1.5
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1))
    want = (x.double() @ base.dequantize_unrounded().double().t()).float()
    torch.testing.assert_close(base.linear_unrounded(x), want, rtol=1e-5, atol=1e-6)


def test_a_layer_leaves_its_adapter_out_and_comes_back() -> None:
    base = random_weight((13, 200), IntGrid(bits=3, group_size=64))
    layer = PackedLinear(base, torch.randn(13))
    x = torch.randn(4, 200)
    layer.adapter = ADAPTERS["lr_qat"]().build(base)
    with torch.no_grad():
        for parameter in layer.adapter.parameters():
            parameter.normal_()
    trained = layer(x)
    with torch.no_grad(), unrounded(layer):
        assert layer.bias is not None
        want = base.linear_unrounded(x) + layer.bias
        assert torch.equal(layer(x), want) and not torch.allclose(layer(x), trained)
        assert torch.equal(layer.weight, base.dequantize_unrounded())
    assert torch.equal(layer(x), trained) and not layer.unrounded


def test_it_does_not_change_while_the_model_trains_and_is_the_dense_model() -> None:
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        full = model(ids).logits
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            weight = layer.weight.data
            packed = CALIBRATORS["minmax"].run(
                weight, IntGrid(bits=3, group_size=32, symmetric=False), Stats()
            )
            model.set_submodule(name, PackedLinear(packed))
    attach(model, ADAPTERS["dl_qat"](rank=2))  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        with unrounded(model):
            before = model(ids).logits
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        with unrounded(model):
            after = model(ids).logits
        rounded = model(ids).logits
    assert torch.equal(before, after)
    assert (before - full).abs().mean() * 8 < (rounded - full).abs().mean()


def test_embeddings_look_up_what_they_keep() -> None:
    grid = IntGrid(bits=4, group_size=32, residual_bits=4)
    table = PackedEmbedding(random_weight((10, 64), grid), torch.float32, factor=2.0)
    ids = torch.tensor([[1, 3, 3]])
    with unrounded(table):
        assert torch.equal(table(ids)[0], table.base.dequantize_unrounded()[ids[0]] * 2)
    assert torch.equal(table(ids)[0], table.base.dequantize()[ids[0]] * 2)


@pytest.mark.parametrize("grid", [IntGrid(bits=4, residual_bits=0), BinaryGrid(bits=2)], ids=str)
def test_layers_without_a_residual_are_refused_by_name(grid: Any) -> None:
    model = nn.ModuleDict({"kept": PackedLinear(random_weight((8, 128), IntGrid()))})
    model["lost"] = PackedLinear(random_weight((8, 128), grid))
    with pytest.raises(ValueError, match=r"1 packed layers keep no residual \(lost\).*residual_bits: 4"):
        with unrounded(model):
            pass
    assert not any(layer.unrounded for layer in model.values())  # pyright: ignore[reportAttributeAccessIssue]
    model["lost"] = PackedLinear(random_weight((8, 128), IntGrid(bits=8, residual_bits=0)))
    with unrounded(model):  # 8 bits are the weight
        assert torch.equal(model["lost"](torch.eye(128)), model["lost"].base.linear(torch.eye(128)))
