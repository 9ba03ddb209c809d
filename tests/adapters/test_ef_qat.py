"""EfQAT: which rows are chosen, what becomes of rows that leave and come back, and what a backward costs."""

from __future__ import annotations

from typing import Any

import lowbit_kernels as kernels
import pytest
import torch
from torch import Tensor, nn

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapter_state, attach, begin_step, load_adapter_state
from lowbit_ft.adapters.carry import Carried, carry_rows
from lowbit_ft.adapters.ef_qat import EfQAT
from lowbit_ft.adapters.rows import allotted, highest, in_tiles
from lowbit_ft.grid import IntGrid, PackedWeight
from lowbit_ft.model.linear import PackedLinear
from tests.adapters.common import packed
from tests.gemms import Gemms
from tests.kernels.common import error

GRID = IntGrid(bits=3, group_size=32, symmetric=False)


def built(base: PackedWeight, **options: Any) -> EfQAT:
    adapter = ADAPTERS["ef_qat"](method="ef_qat", **options).build(base)  # pyright: ignore[reportCallIssue]
    assert isinstance(adapter, EfQAT)
    return adapter


def test_the_rows_with_the_largest_weights_are_chosen() -> None:
    base = packed(GRID, (96, 64))
    adapter = built(base, share=0.2)  # 19.2 rows: 16 is nearer than 32
    want = base.dequantize().abs().mean(1).topk(16).indices.sort().values
    assert torch.equal(adapter.rows, want) and adapter.delta is not None and adapter.delta.shape == (16, 64)
    assert built(base, share=1.0).rows.tolist() == list(range(96))
    assert len(built(base, share=0.05, min_rows=48).rows) == 48
    assert len(built(packed(GRID, (9, 64)), share=0.05).rows) == 9, "a small layer has no 16 rows"
    for wrong in ({"min_rows": 20}, {"min_rows": 0}, {"share": 0}, {"refresh_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            built(base, **wrong)


def test_equal_rows_are_taken_from_the_top() -> None:
    assert highest(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]
    assert [in_tiles(wanted, 100, 16) for wanted in (3, 25, 39, 99.9)] == [16, 32, 32, 96]


def test_a_network_wide_share() -> None:
    """One threshold over all rows: what one layer has more, another has less, but none is starved."""
    large, small = torch.rand(128) + 2, torch.rand(128)
    layers = {"large": (large, (128, 64)), "small": (small, (128, 64)), "tiny": (small[:8], (8, 64))}
    assert allotted(layers, 0.25, "network", 16) == {"large": 64, "small": 16, "tiny": 8}
    assert allotted(layers, 0.6, "whole_layers", 16) == {"large": 128, "small": 0, "tiny": 0}
    assert allotted(layers, 0.01, "whole_layers", 16) == {"large": 128, "small": 0, "tiny": 0}


def model_of(**options: Any) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [PackedLinear(packed(GRID, (64, 64))) for _ in range(3)]
    layers[1].get_buffer("scale").mul_(4)
    model = nn.Sequential(*layers)
    attach(model, ADAPTERS["ef_qat"](method="ef_qat", **options))  # pyright: ignore[reportCallIssue]
    return model


def adapters(model: nn.Module) -> list[EfQAT]:
    return [m for m in model.modules() if isinstance(m, EfQAT)]


def test_whole_layers_train_whole_and_scales_everywhere() -> None:
    model = model_of(scope="whole_layers", share=0.4)
    assert [a.delta is not None for a in adapters(model)] == [False, True, False]
    assert adapters(model)[1].rows.tolist() == list(range(64))
    model(torch.randn(20, 64)).square().mean().backward()
    assert all(a.log_scale.grad is not None and a.log_scale.grad.any() for a in adapters(model))
    other = model_of(scope="whole_layers", share=0.4)
    load_adapter_state(other, adapter_state(model))


@pytest.mark.parametrize("group_size", [-1, 128])
@pytest.mark.parametrize("share", [0.05, 0.25])
def test_a_backward_is_dx_and_the_share_of_a_product(share: float, group_size: int) -> None:
    """With one scale per row nothing else; with several, the tokens that other rows' scales learn from."""
    m, n, k = 640, 1024, 512
    weight = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    groups = kernels.group_count(k, group_size)
    base = PackedWeight(
        codes=kernels.pack(weight, 4),
        scale=torch.ones(groups, n).bfloat16(),
        shape=(n, k),
        grid=IntGrid(bits=4, group_size=group_size, residual_bits=0),
    )
    adapter, x = built(base, share=share), torch.randn(m, k, requires_grad=True)
    rows = len(adapter.rows)
    with Gemms() as forward:
        y = adapter(x, base)
    with Gemms() as backward:
        y.backward(torch.randn(m, n))
    product, tokens = 2 * m * n * k, 0.1 if group_size == 128 else 0.0
    want = 1 + rows / n + tokens
    assert forward.flops == product and want <= backward.flops / product < want + 0.01
    assert (rows, m, k) in backward.calls and (n, m, k) not in backward.calls
    assert rows / n == pytest.approx(share, abs=8 / n)


def test_the_scales_of_frozen_rows_learn_without_a_product() -> None:
    """The row-wise identity of all rows, and dW of the chosen ones: both are dS = sum dW q."""
    base = packed(IntGrid(bits=4, group_size=-1), (64, 96))
    some, exact = built(base, share=0.25), ADAPTERS["scale"](method="scale").build(base)
    x, dy = torch.randn(50, 96), torch.randn(50, 64)
    for adapter in (some, exact):
        adapter(x, base).backward(dy)
    frozen = torch.ones(64, dtype=torch.bool).index_fill(0, some.rows, False)
    got, want = some.log_scale.grad, exact.get_parameter("log_scale").grad
    assert got is not None and want is not None
    assert error(got[:, frozen], want[:, frozen].double()) < 1e-5 and got[:, ~frozen].any()


def push(adapter: EfQAT, rows: list[int], size: float) -> None:
    """Make rows heavy or light, through the scales that they ship with."""
    with torch.no_grad():
        adapter.log_scale[:, rows] += size


@pytest.mark.parametrize("master", ["fp32", "none"])
def test_rows_that_leave_keep_their_codes_and_come_back_to_them(master: str) -> None:
    base = packed(GRID, (64, 64))
    adapter = built(base, share=0.25, refresh_steps=2, master=master)
    assert adapter.delta is not None
    with torch.no_grad():
        adapter.delta.normal_(0, 2)
        if master == "none":
            adapter.delta.round_()
    assert adapter.begin_step(0, base) == adapter.begin_step(1, base) == []
    first, light = adapter.rows.tolist(), adapter.rows[:3].tolist()
    push(adapter, light, -20.0)
    before, delta = adapter.merge(base), adapter.delta
    assert isinstance(before, PackedWeight) and adapter.begin_step(3, base) == []
    [carried] = adapter.begin_step(4, base)
    assert carried.parameter is delta and not set(light) & set(adapter.rows.tolist())
    assert adapter.left.tolist() == light
    new = carried.source < 0
    assert int(new.sum()) == 3 and [first[i] for i in carried.source[~new]] == adapter.rows[~new].tolist()
    after = adapter.merge(base)
    assert isinstance(after, PackedWeight)
    stay = torch.ones(64, dtype=torch.bool).index_fill(0, adapter.rows[new], False)
    assert torch.equal(after.codes[stay], before.codes[stay]), "a choice of rows moves no code"
    assert torch.equal(after.codes, before.codes), "nor does a row that begins at the base's codes"
    assert not torch.equal(before.unpack_codes()[light], base.unpack_codes()[light])
    # and back
    push(adapter, light, 20.0)
    [_] = adapter.begin_step(6, base)
    again = adapter.merge(base)
    assert isinstance(again, PackedWeight) and torch.equal(again.codes, before.codes)
    assert set(light) <= set(adapter.rows.tolist()) and not set(light) & set(adapter.left.tolist())
    assert master == "fp32" or torch.equal(adapter.delta, adapter.delta.round()), "in whole steps"
    x = torch.randn(5, 64)
    assert torch.equal(adapter(x, base), again.linear(x)), "and trains what ships"


@pytest.mark.parametrize("backward", [True, False])  # zeroth order has none
def test_rows_chosen_by_what_step_0_saw(backward: bool) -> None:
    """Mean |w| rms(x): an input that is nearly all of the sum decides alone."""
    base = packed(GRID, (64, 64))
    adapter = built(base, share=0.25, importance="weight_input").train()
    adapter.begin_step(0, base)
    x = torch.randn(30, 64) * torch.ones(64).index_fill(0, torch.tensor([7]), 1e4)
    with torch.set_grad_enabled(backward):
        adapter(x, base)
    adapter.begin_step(1, base)
    want = base.dequantize().abs()[:, 7].topk(16).values.min()
    assert base.dequantize().abs()[adapter.rows, 7].min() >= want
    rows, seen = adapter.rows.clone(), adapter.input_size.clone()
    adapter(x, base)
    adapter.begin_step(2, base)
    assert torch.equal(adapter.rows, rows) and torch.equal(adapter.input_size, seen)


def test_a_loop_that_counts_no_steps_is_told() -> None:
    base = packed(GRID, (64, 64))
    with pytest.warns(UserWarning, match="ef_qat: refresh_steps.*begin_step"):
        built(base, refresh_steps=3).train()(torch.randn(2, 64), base)


def test_averages_follow_their_rows() -> None:
    parameter = nn.Parameter(torch.zeros(4, 3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.arange(12.0).view(4, 3) - 5
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    source = torch.tensor([2, -1, 0, 1])
    carry_rows(optimizer, [Carried(parameter, source)])
    mean, square = (optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq"))
    assert torch.equal(mean[[0, 2, 3]], before["exp_avg"][[2, 0, 1]]) and not mean[1].any()
    assert torch.equal(square[[0, 2, 3]], before["exp_avg_sq"][[2, 0, 1]])
    assert torch.equal(square[1], before["exp_avg_sq"][[2, 0, 1]].mean(0))
    assert optimizer.state[parameter]["step"] == 1
    optimizer.state[parameter]["state1"] = torch.zeros(12, dtype=torch.uint8)
    with pytest.raises(ValueError, match="cannot follow a row.*adamw"):
        carry_rows(optimizer, [Carried(parameter, source)])


def test_a_state_with_more_rows_behind_it_is_read() -> None:
    model = model_of(refresh_steps=1)
    for step, a in enumerate(adapters(model)):
        push(a, a.rows[: 4 + step].tolist(), -20.0)
    assert len(begin_step(model, 1)) == 3
    state: dict[str, Tensor] = adapter_state(model)
    assert {len(t) for name, t in state.items() if name.endswith("left")} == {4, 5, 6}
    other = model_of(refresh_steps=1)
    load_adapter_state(other, state)
    x = torch.randn(4, 64)
    assert torch.equal(model(x), other(x))


def test_numbers_of_rows_in_a_file_are_looked_at() -> None:
    """Of a stranger's file: an index past the layer, or a row twice, is said and not computed with."""
    model = model_of(refresh_steps=1)
    for a in adapters(model):
        push(a, a.rows[:4].tolist(), -20.0)
    begin_step(model, 1)
    state = adapter_state(model)
    key = "base_model.model.0.lowbit_adapters."
    rows, left = state[f"{key}rows"], state[f"{key}left"]
    assert len(left) == 4
    for name, value, words in (
        ("rows", rows + 64, "rows: needs numbers of the layer's 64 rows"),
        ("rows", rows - 64, "rising and each once"),
        ("rows", torch.full_like(rows, 5), "rising and each once"),
        ("rows", rows.float(), "got torch.float32"),
        ("left", rows[:4], "left: has rows that train"),
        ("left", left[:3], "left_codes: got 4 rows"),
        ("delta", state[f"{key}delta"].bfloat16(), "delta: got torch.bfloat16; adapter.master: fp32 holds"),
    ):
        other = model_of(refresh_steps=1)
        with pytest.raises(ValueError, match=words):
            load_adapter_state(other, state | {key + name: value})
        assert not adapters(other)[0].left.numel(), "nothing was changed"
