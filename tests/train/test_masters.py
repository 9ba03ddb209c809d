"""AdamW of a D that is held in bf16, or in whole grid steps: its equations in float64, what it does not lose,
and a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.grid import IntGrid
from lowbit_ft.train.optim import build_optimizer, load_optimizer_state, optimizer_state
from lowbit_ft.train.optimizers.masters import MasterAdamW, at_random
from tests.adapters.common import packed
from tests.toy import section

SHAPE = (24, 40)
NAME = "layer.adapter.delta"


def made(master: str, start: Tensor | None = None, **options: Any) -> tuple[nn.Parameter, Any]:
    delta = nn.Parameter((torch.zeros(SHAPE) if start is None else start).bfloat16())
    return delta, build_optimizer([(NAME, delta)], section(**options), master)


def gradient(step: int) -> Tensor:
    """The same in every run, in bf16, with a mean of its own in every place."""
    g = torch.Generator().manual_seed(step)
    mean = torch.linspace(-1, 1, SHAPE[0] * SHAPE[1]).view(SHAPE)
    return (mean + 0.3 * torch.randn(SHAPE, generator=g)).bfloat16()


def test_whole_steps_and_their_remainder_by_the_equations_in_float64() -> None:
    """Steps of 1 with rates that change; D is equal, the first average to fp32."""
    torch.manual_seed(0)
    start = torch.randint(-3, 4, SHAPE).float()
    options: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    delta, optimizer = made("none", start, **options)
    d, m, v = start.double(), torch.zeros(SHAPE).double(), torch.zeros(SHAPE).double()
    b1, b2 = 0.8, 0.95
    for t in range(1, 31):
        rate = 1.0 * (1 - t / 40)
        optimizer.param_groups[0]["lr"] = rate
        delta.grad = gradient(t)
        g = gradient(t).double()
        optimizer.step()
        assert delta.grad is not None, "others read it behind the step"
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        den = (v / (1 - b2**t)).sqrt() + 1e-3
        w = (1 - rate * 0.1) * d - rate * m / (1 - b1**t) / den
        d = w.round()
        m = m + (1 - b1**t) / rate * (1 - 1 / b1) * den * (w - d)
        assert torch.equal(delta.double(), d)
    assert (d - start).abs().max() >= 2 and (d != start).double().mean() > 0.3
    found = optimizer.state[delta]["exp_avg"].double()
    assert float((found - m).abs().max() / m.abs().max()) < 1e-5


def test_what_rounding_throws_away_is_all_put_back() -> None:
    """Codes and what waits in the average are, together, the latent weight of plain AdamW."""
    torch.manual_seed(0)
    force = torch.randn(SHAPE).bfloat16()
    options: dict[str, Any] = {"betas": (0.9, 0.99), "learning_rate": 0.02}
    delta, optimizer = made("none", **options)
    latent = nn.Parameter(torch.zeros(SHAPE))
    plain = build_optimizer([(NAME, latent)], section(**options))
    for _ in range(400):
        delta.grad, latent.grad = force.clone(), force.float()
        optimizer.step()
        plain.step()
    ours, theirs = optimizer.state[delta], plain.state[latent]
    den = ours["exp_avg_sq"].sqrt() + 1e-8
    waits = 0.02 * 0.9 / 0.1 * (ours["exp_avg"] - theirs["exp_avg"]) / den
    assert float(latent.detach().abs().min()) > 7 and delta.detach().unique().numel() > 2
    # apart but for the first steps, whose bias corrections are of other steps than what they put back
    assert float((delta.detach().float() - waits - latent.detach()).abs().max()) < 0.3


def test_rounded_at_random_nothing_is_lost_on_average() -> None:
    x = torch.tensor([1.0 + 2**-10, -3.0 - 2**-9, 0.1, 1e-30, 2.0, torch.inf, torch.nan])
    drawn = torch.stack([at_random(x.clone(), torch.Generator().manual_seed(i)) for i in range(4000)])
    assert drawn.dtype == torch.bfloat16 and drawn[:, 6].isnan().all() and drawn[:, 5].isinf().all()
    assert drawn[:, 4].unique().tolist() == [2.0], "what bf16 holds stays"
    for column, value in zip(drawn[:, :4].float().t(), x[:4], strict=True):
        assert len(column.unique()) == 2 and bool((column.min() < value) & (value < column.max()))
        assert float((column.mean() - value).abs()) < 0.05 * float(column.max() - column.min())
    # a step of a hundredth of what bf16 tells apart, a hundred times
    delta, optimizer = made("bf16", torch.ones(SHAPE), learning_rate=2**-7 / 100)
    for _ in range(100):
        delta.grad = torch.ones(SHAPE).bfloat16()
        optimizer.step()
    assert float(delta.detach().float().mean()) == pytest.approx(1 - 2**-7, abs=5e-4)


@pytest.mark.parametrize("master", ["bf16", "none"])
def test_a_step_resumes_bit_equal_and_scales_are_stepped_by_torch(master: str) -> None:
    def fresh() -> list[tuple[str, nn.Parameter]]:
        scale = nn.Parameter(torch.zeros(4, 3))
        return [(NAME, nn.Parameter(torch.zeros(SHAPE).bfloat16())), ("layer.adapter.log_scale", scale)]

    def step(optimizer: Any, named: list[tuple[str, nn.Parameter]], number: int) -> None:
        named[0][1].grad, named[1][1].grad = gradient(number), torch.full((4, 3), 0.1 * number)
        optimizer.step()

    config = section(learning_rate=0.7, seed=7)
    named = fresh()
    optimizer = build_optimizer(named, config, master)
    assert isinstance(optimizer, MasterAdamW)
    for number in (1, 2, 3):
        step(optimizer, named, number)
    tensors, numbers = optimizer_state(optimizer, {p: n for n, p in named})
    resumed = [(n, nn.Parameter(p.detach().clone())) for n, p in named]
    other = build_optimizer(resumed, config, master)
    load_optimizer_state(other, {p: n for n, p in resumed}, load(save(tensors)), numbers)
    step(optimizer, named, 4)
    step(other, resumed, 4)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named, resumed, strict=True))
    assert named[0][1].any() and (master == "bf16" or torch.equal(named[0][1], named[0][1].round()))
    alone = fresh()[1:]
    torches = build_optimizer(alone, config)
    for number in (1, 2, 3, 4):
        alone[0][1].grad = torch.full((4, 3), 0.1 * number)
        torches.step()
    assert torch.equal(alone[0][1], named[1][1]) and type(torches) is torch.optim.AdamW


def test_the_gradient_of_a_short_d_is_that_of_fp32_rounded_once() -> None:
    base = packed(IntGrid(bits=2, group_size=32), (32, 64))
    x, dy, found = torch.randn(40, 64), torch.randn(40, 32), {}
    for master in ("fp32", "bf16", "none"):
        config = ADAPTERS["full_qat"].model_validate({"method": "full_qat", "master": master})
        adapter: Any = config.build(base)
        adapter(x, base).backward(dy)
        found[master] = adapter.delta.grad
    assert found["bf16"].dtype == torch.bfloat16 and found["fp32"].any()
    assert torch.equal(found["bf16"], found["fp32"].bfloat16()) and torch.equal(found["none"], found["bf16"])


def test_an_optimizer_that_cannot_hold_it_is_refused() -> None:
    with pytest.raises(ValueError, match="'adamw8bit', which steps on fp32 alone, and adapter.master is"):
        made("none", optimizer="adamw8bit")
