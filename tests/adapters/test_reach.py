"""Whether a learning rate can move a code: the bound against training, at the rates on both of its sides."""

import pytest
import torch

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapted_layers, attach
from lowbit_ft.adapters.rates import OTHERS, RATES, rate_for
from lowbit_ft.adapters.reach import reach
from lowbit_ft.grid import IntGrid, PackedWeight
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.train.optimizers.masters import MasterAdamW

STEPS = 12


def model_of(method: str, residual_bits: int = 4, **keys: str) -> torch.nn.Module:
    torch.manual_seed(0)
    grid = IntGrid(bits=3, group_size=32, residual_bits=residual_bits)
    base = CALIBRATORS["mse"].run(torch.randn(48, 64) * 0.1, grid, Stats())
    model = torch.nn.Sequential(PackedLinear(base))
    options = {"rank": 8} if "rank" in ADAPTERS[method].model_fields else {}
    attach(model, ADAPTERS[method].model_validate({"method": method, **options, **keys}))
    return model


def moved(model: torch.nn.Module, rate: float) -> int:
    """Codes that are others after STEPS of Adam on a random target."""
    layer = next(iter(adapted_layers(model)))[1]
    assert layer.adapter is not None and isinstance(layer.base, PackedWeight)
    optimizer = torch.optim.Adam(layer.adapter.parameters(), lr=rate)
    x, y = torch.randn(256, 64), torch.randn(256, 48)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return int((layer.adapter.merge(layer.base).unpack_codes() != layer.base.unpack_codes()).sum())


@pytest.mark.parametrize("method", ["lr_qat", "dl_qat", "full_qat", "ef_qat"])
@pytest.mark.parametrize("residual_bits", [0, 2, 4])
def test_below_the_bound_no_code_moves_and_above_it_some_do(method: str, residual_bits: int):
    model = model_of(method, residual_bits)
    found = reach(model, 0.0)
    assert found is not None and (found.layers, found.still) == (1, 1)
    least = found.needed / STEPS
    below, above = reach(model, 0.99 * found.needed), reach(model, 1.01 * found.needed)
    assert below is not None and above is not None and (below.still, above.still) == (1, 0)
    assert moved(model, 0.9 * least) == 0
    assert moved(model_of(method, residual_bits), 4 * least) > 0, "the bound is no empty one"


def test_without_a_master_steps_have_to_fill_the_average_first():
    """Ten steps of one direction: the average holds 1 - 0.9^10 over 0.1 of them until a code moves."""
    model, gathers = model_of("full_qat", master="none"), (1 - 0.9**10) / 0.1
    delta = model.get_parameter("0.adapter.delta")
    found = reach(model, 0.0, gathers)
    assert found is not None and found.needed == pytest.approx(0.5 * gathers)
    for share, some in ((0.95, False), (1.1, True)):
        delta.data.zero_()
        group = {"params": [delta], "name": "low_rank", "master": "none"}
        optimizer = MasterAdamW([group], 0, lr=share * found.needed / 10)
        for _ in range(10):
            delta.grad = torch.ones_like(delta)
            optimizer.step()
        assert bool(delta.any()) == some


def test_what_the_bound_says_nothing_of():
    assert reach(model_of("scale"), 1.0) is None
    assert reach(model_of("l4q"), 1.0) is None  # its scale re-grids the base
    assert reach(model_of("lora"), 1.0) is None
    model = model_of("lr_qat")
    next(iter(adapted_layers(model)))[1].adapter.B.data[0, 0] = 1.0  # pyright: ignore[reportOptionalMemberAccess]
    assert reach(model, 1.0) is None
    model = model_of("full_qat")
    next(iter(adapted_layers(model)))[1].adapter.delta.data[0, 0] = 1.0  # pyright: ignore[reportOptionalMemberAccess]
    assert reach(model, 1.0) is None


def test_rates_are_of_methods_and_bits_that_there_are():
    assert RATES and set(RATES) <= set(ADAPTERS)
    for by_bits in RATES.values():
        assert set(by_bits) <= {2, 3, 4, 8} and all(1e-4 < rate <= 1e-1 for rate in by_bits.values())
        assert [by_bits[b] for b in sorted(by_bits)] == sorted(by_bits.values(), reverse=True), (
            "fewer bits, more"
        )
    assert rate_for("alpha_tuning", 1)[0] == OTHERS and "none was searched" in rate_for("alpha_tuning", 1)[1]
