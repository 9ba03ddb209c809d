"""add_weighted_adapter: the sum of what adapters do, where there is one, and a refusal by name elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.integrations.peft_layer import LowBitLinear
from tests.integrations.peft_models import QUICK, logits, trained

SUMMED = ("scale", "alpha_tuning")
PAIR = ("two", "three")


def with_two(method: str, **keys: Any) -> Any:
    """A model with three adapters, each trained a little elsewhere."""
    model = trained(method, "one", **keys)
    for seed, name in enumerate(PAIR):
        model.add_adapter(name, LowBitConfig(method=method, **(QUICK[method] | keys)))
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def scale_of(layer: LowBitLinear, name: str | None) -> Tensor:
    """The scales with that adapter (None: of the base), of which W^ is a linear function: the codes stay."""
    base: Any = layer.base_layer.base
    adapter: Any = None if name is None else layer.lowbit_adapters[name]
    merged = base.without_residual() if adapter is None else adapter.merge(base)
    assert torch.equal(merged.unpack_codes(), base.unpack_codes())
    return merged.scale.double()


@pytest.mark.parametrize("method", SUMMED)
@pytest.mark.parametrize("weights", [(0.5, 0.75), (1.0, -0.5), (0.0, 1.0)])
def test_the_sum_is_that_of_the_changes(method: str, weights: tuple[float, float]) -> None:
    model = with_two(method)
    active = logits(model)
    model.add_weighted_adapter(["two", "three"], list(weights), "sum")
    assert torch.equal(logits(model), active) and model.active_adapter == "one"
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)
    for layer in model.modules():
        if isinstance(layer, LowBitLinear):
            base = scale_of(layer, None)
            changes = [w * (scale_of(layer, n) - base) for w, n in zip(weights, PAIR, strict=True)]
            expected, found = base + sum(changes), scale_of(layer, "sum")
            # scales ship in bfloat16: half a unit in the last place for each of those that are rounded
            size = base.abs() + expected.abs() + sum(change.abs() for change in changes)
            assert torch.all((found - expected).abs() <= 2**-8 * size)
    model.set_adapter("sum")
    assert not torch.equal(logits(model), active)
    if weights == (0.0, 1.0):
        summed = logits(model)
        model.set_adapter("three")
        assert torch.equal(summed, logits(model))


@pytest.mark.parametrize("method", [name for name in ADAPTERS if name not in SUMMED])
def test_elsewhere_it_is_refused_by_name(method: str) -> None:
    model = with_two(method)
    with pytest.raises(ValueError, match=rf"{method} rounds what its adapters add.*set_adapter"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum")
    assert "sum" not in model.peft_config and not any(".sum." in name for name, _ in model.named_parameters())


def test_what_has_no_sum_says_why() -> None:
    model = with_two("scale")
    model.add_adapter("other", LowBitConfig(method="scale", target_modules=["q_proj"]))
    for arguments, message in (
        ((["one"], [1.0, 2.0], "sum"), "got 1 adapters and 2 weights"),
        ((["one", "four"], [1.0, 2.0], "sum"), "'four' not found; there are one, two, three, other"),
        ((["one", "two"], [1.0, float("nan")], "sum"), "weights: got nan"),
        ((["one", "two"], [1.0, 2.0], "three"), "'three' is taken"),
        ((["one", "other"], [1.0, 2.0], "sum"), "'one' and 'other' differ in method, options or target"),
        ((["one", "two"], [1.0, 2.0], "sum", "svd"), "got 'svd'; allowed: linear"),
        ((["two", "three"], [9.0, -9.0], "sum"), "scales would be 0 or change their sign"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
