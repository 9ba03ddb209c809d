"""L4Q: what its base needs, what its offsets ship, and its warm-up."""

import itertools

import pytest
import torch
from torch import Tensor

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.grid import IntGrid, PackedWeight
from lowbit_ft.merge import merged_weight
from lowbit_ft.model.linear import PackedLinear
from tests import reference
from tests.adapters.common import packed, trained

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("f", [0, 1])
def test_l4q_refuses_a_base_without_enough_residual(f: int):
    reason = ADAPTERS["l4q"]().reject(IntGrid(residual_bits=f))
    assert reason and "gradient is zero" in reason and "residual_bits: 4" in reason


def test_why_l4q_refuses_residual_0():
    """Why: at f = 0 the gradient of the scale is zero at the start, at f = 4 it is not."""
    grads = {}
    for f in (0, 4):
        base = packed(IntGrid(bits=4, group_size=32, residual_bits=f))
        adapter = ADAPTERS["l4q"]().build(base)
        adapter(torch.randn(5, 200), base).square().sum().backward()
        grads[f] = adapter.log_scale.grad.abs().max()
    assert grads[0] < 1e-3 * grads[4]


@pytest.mark.parametrize(
    ("symmetric", "offset", "zero", "shift"),
    [
        (True, "auto", False, False),
        (False, "auto", True, False),
        (True, "integer", True, False),
        (True, "float", False, True),
        (False, "float", True, True),
        (False, "none", True, False),
    ],
)
def test_l4q_offset_decides_what_ships(symmetric: bool, offset: str, zero: bool, shift: bool):
    base = packed(IntGrid(bits=3, group_size=32, symmetric=symmetric))
    config = ADAPTERS["l4q"](offset=offset)
    merged = trained(config, base).merge(base)
    assert isinstance(merged, PackedWeight)
    assert (merged.zero is not None) == zero and (merged.offset is not None) == shift == config.ships_offset
    if offset != "none" and zero and not shift:
        start = torch.full_like(merged.zero, 4) if symmetric else base.zero
        assert merged.zero.max() <= 7 and not torch.equal(merged.zero, start), "the zero point did not move"


def dense_proxy(base: PackedWeight) -> Tensor:
    """s0 (c - z0 + rho), float64 [N, K]: the weight to b + f bits."""
    dense = reference.Base.of(base)
    return dense.wide(dense.s0) * (dense.code - dense.wide(dense.z0) + dense.rho)


@pytest.mark.parametrize(
    ("bits", "f", "symmetric"), list(itertools.product((2, 4, 8), (2, 4), (True, False)))
)
def test_l4q_warmup_is_plain_lora_on_the_unrounded_proxy(bits: int, f: int, symmetric: bool):
    base = packed(IntGrid(bits=bits, group_size=64, symmetric=symmetric, residual_bits=f))
    config = ADAPTERS["l4q"](rank=4, alpha=6.0, warmup_steps=2)
    adapter = trained(config, base)
    adapter.begin_step(0, base)
    x, dy = torch.randn(5, 200), torch.randn(5, 13)
    y = adapter(x, base)
    y.backward(dy)
    a, b = (p.detach().double().requires_grad_() for p in (adapter.A, adapter.B))
    want = x.double() @ (dense_proxy(base) + 1.5 * b @ a).t()
    want.backward(dy.double())
    for got, ref in ((y, want), (adapter.A.grad, a.grad), (adapter.B.grad, b.grad)):
        assert (got.double() - ref).norm() < 1e-5 * ref.norm()
    assert adapter.log_scale.grad is None


@pytest.mark.parametrize(
    ("symmetric", "offset"), [(True, "auto"), (False, "auto"), (True, "float"), (False, "none")]
)
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_l4q_switch_restarts_the_scale_from_the_warmed_weight(symmetric: bool, offset: str, group_size: int):
    """L4Qinit: S = max(|min W / Qn|, |max W / Qp|) per group of W = s0 Phi0 + g B A; only once."""
    base = packed(IntGrid(bits=4, group_size=group_size, symmetric=symmetric), calibrate="mse")
    config = ADAPTERS["l4q"](rank=4, offset=offset, warmup_steps=3)
    adapter = config.build(base)
    with torch.no_grad():
        adapter.B.normal_(0, 0.3)
    for step in range(3):
        adapter.begin_step(step, base)
        assert adapter.warming and not adapter.log_scale.any()
    adapter.begin_step(3, base)
    assert not adapter.warming
    weight = dense_proxy(base) + config.gain * (adapter.B @ adapter.A).detach().double()
    size = 200 if group_size == -1 else group_size
    zero = torch.full(base.scale.shape, 8.0) if symmetric else base.zero.double()
    signs = base.scale.double().sign()  # a negative scale turns the range round
    turned = weight * reference.columns(signs, 200, group_size)
    want = torch.stack(
        [
            torch.maximum(part.amax(1) / (15 - z).clamp_min(1), -part.amin(1) / z.clamp_min(1))
            for part, z in zip(turned.split(size, dim=1), zero, strict=True)
        ]
    )
    got = base.scale.double().abs() * adapter.log_scale.detach().double().exp()
    torch.testing.assert_close(got, want.double(), rtol=1e-5, atol=1e-7)
    # Nothing is clipped by more than what bf16 takes from the scale.
    dense = adapter.merge(base).dequantize().double()
    step = reference.columns(got, 200, group_size)
    assert ((dense - weight).abs() <= step * 0.56).all()
    with torch.no_grad():
        adapter.log_scale.add_(0.1)
    kept = adapter.log_scale.detach().clone()
    adapter.begin_step(4, base)
    assert torch.equal(adapter.log_scale, kept)


def test_l4q_resumes_on_either_side_of_the_switch():
    base = packed(IntGrid(bits=4, group_size=32))
    config = ADAPTERS["l4q"](rank=4, warmup_steps=3)
    first = trained(config, base)
    state = {name: t.clone() for name, t in first.state_dict().items()}
    for step in (3, 4):  # the checkpoint holds the tensors as they were before this step
        fresh, again = config.build(base), config.build(base)
        for adapter in (fresh, again):
            adapter.load_state_dict(state)
        if step == 3:
            fresh.begin_step(2, base)  # an uninterrupted run has seen the warm-up
        fresh.begin_step(step, base)
        again.begin_step(step, base)
        assert torch.equal(fresh.log_scale, again.log_scale)
        assert torch.equal(fresh.log_scale, state["log_scale"]) == (step == 4)


def test_a_loaded_l4q_adapter_is_past_its_warmup():
    """Loaded for evaluation nobody calls begin_step: its forward must be the weight that merge ships."""
    base = packed(IntGrid(bits=4, group_size=32))
    adapter = trained(ADAPTERS["l4q"](rank=4, warmup_steps=10), base)
    assert torch.equal(adapter(torch.eye(200), base), adapter.merge(base).dequantize().t())


def test_an_l4q_adapter_in_its_warmup_is_not_merged():
    base = packed(IntGrid(bits=4, group_size=32))
    layer = PackedLinear(base)
    layer.adapter = trained(ADAPTERS["l4q"](rank=4, warmup_steps=2), base)
    for step in range(2):
        layer.adapter.begin_step(step, base)
        with pytest.raises(ValueError, match="still in its warm-up of 2 steps.*begin_step.*warmup_steps: 0"):
            merged_weight(layer)
    layer.adapter.begin_step(2, base)
    assert torch.equal(layer(torch.eye(200)), merged_weight(layer).dequantize().t())
