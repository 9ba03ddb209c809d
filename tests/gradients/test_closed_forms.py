"""The law of this family: backprop is the plain loop, bit for bit; the mean of an estimate is its closed form
on a quadratic; the widths of smoothings are those at which a rounded function becomes the estimator's; and
the pull to the codes does what its equations say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lowbit_kernels import layout
from lowbit_kernels.codes import grid_values
from lowbit_kernels.layout import ungrouped
from torch import Tensor

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.gradients import GRADIENTS, Making
from lowbit_ft.gradients.cage import CageConfig
from lowbit_ft.gradients.directions import DISTRIBUTIONS, WIDTHS, direction
from lowbit_ft.grid import IntGrid
from tests.gradients.common import ROWS, Layer, flat, gradients, making, window

PULLED = [name for name, config in ADAPTERS.items() if config(method=name).code_parameters]
LOW_RANK = [name for name in PULLED if not ADAPTERS[name].dense_delta]
GROUPS = IntGrid(bits=3, group_size=32, symmetric=True, residual_bits=4)


class Quadratic:
    """L = 1/2 t' H t - c' t of all numbers t; where gradients are on, another one, as a straight-through
    backward would give."""

    def __init__(self, made: Making, curved: float = 1.0) -> None:
        self.made = made
        start = flat(made.trained)
        g = torch.Generator().manual_seed(0)
        root = torch.randn(len(start), len(start), generator=g, dtype=torch.float64) / len(start) ** 0.5
        self.h, self.c = curved * root @ root.t(), torch.randn(len(start), generator=g, dtype=torch.float64)
        self.bias = 0.7 * torch.randn(len(start), generator=g, dtype=torch.float64)
        self.gradient = self.h @ start - self.c
        self.given = self.gradient + self.bias

    def __call__(self, i: int) -> Tensor:
        names = sorted(self.made.trained)
        t = torch.cat([self.made.trained[name].double().flatten() for name in names])
        bias = self.bias if torch.is_grad_enabled() else torch.zeros_like(t)
        return 0.5 * t @ self.h @ t - (self.c - bias) @ t


def test_backprop_is_the_plain_loop_bit_for_bit() -> None:
    found = []
    made = making(Layer("lr_qat", (6, 64), rank=3), only=("A", "B", "log_scale"))
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))

    def loss(i: int) -> Tensor:
        return made.model.linear(x[i]).square().sum() / 7  # pyright: ignore[reportCallIssue]

    for by_hand in (True, False):
        made.model.zero_grad()
        if by_hand:
            for i in range(2):
                loss(i).backward()
        else:
            sums = GRADIENTS["backprop"]().make(made).fill(window(loss, size=2))
            assert sums.dtype == torch.float64 and sums.item() == pytest.approx(
                loss(0).item() + loss(1).item()
            )
        found.append(gradients(made))
    assert torch.equal(*found) and len(found[0]) == 3 * 70 + 6


def off(found: Tensor, want: Tensor) -> float:
    return float((found - want).norm() / want.norm())


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_the_mean_of_zeroth_order_is_the_gradient(distribution: str) -> None:
    """Of a quadratic, whatever is smoothed; each tensor by its own step."""
    made = making(Layer())
    q = Quadratic(made, curved=4.0)
    before = {n: p.detach().clone() for n, p in made.trained.items()}
    config = GRADIENTS["zeroth_order"](probes=800, eps=0.7, distribution=distribution)
    told = config.make(made).fill(window(q))
    # the variance of one estimate is n |g|^2 and the kurtosis of the numbers: 4 standard errors
    assert off(gradients(made), q.gradient) < 4 * math.sqrt(18 / 800)
    assert all(torch.equal(p, before[n]) for n, p in made.trained.items()), "masters come back bit for bit"
    with torch.no_grad():
        assert told.item() > q(0).item()  # the smoothed loss of a bowl


def test_the_mean_of_fogzo_is_its_projection() -> None:
    """(1 - beta) L' + beta g (g' D^2 L') / |D g|^2, where D differs between A and B."""
    made = making(Layer(size=1.0), total=1)
    q = Quadratic(made)
    count = len(q.c)
    with torch.no_grad():
        one: Any = made.model.adapter.one_step(made.model.packed)
    d = torch.cat([torch.full((p.numel(),), float(one[n[-1]])) for n, p in sorted(made.trained.items())])
    assert d.max() > 1.5 * d.min(), "the tensors are alike: whitening would not be seen"
    d = d.double() * WIDTHS["round", "identity"]
    for kappa, probes, close in ((0.0, 1, 1e-4), (0.4 * count, 1500, 0.3)):
        config: Any = GRADIENTS["fogzo"](probes=probes, kappa_end=kappa, start=0.0)
        for p in made.trained.values():
            p.grad = None
        gradient = config.make(made)
        gradient.kappa = lambda step, kappa=kappa: kappa
        gradient.fill(window(q))
        noise, g, true = kappa / count, q.given, q.gradient
        guided = g * (g * d * d * true).sum() / (d * g).square().sum()
        assert off(gradients(made), noise * true + (1 - noise) * guided) < close
        assert kappa or off(gradients(made), true) > 0.3, "the straight-through bias is along for the ride"


def test_fogzo_is_backprop_until_its_start_and_its_noise_rises() -> None:
    made = making(Layer(), total=100)
    config = GRADIENTS["fogzo"](start=0.7, kappa_end=0.2)
    gradient: Any = config.make(made)
    kappas = [gradient.kappa(step) for step in (0, 69, 70, 85, 100)]
    assert kappas[:2] == [None, None] and kappas[2:] == pytest.approx([0.0, 0.1, 0.2])
    q = Quadratic(made)
    gradient.fill(window(q, step=10))
    torch.testing.assert_close(gradients(made), q.given, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="allowed: below the 11 numbers"):
        GRADIENTS["fogzo"](kappa_end=11).make(made)


SMOOTHED = {
    ("round", "identity"): ("uniform", torch.round, lambda x: x),
    ("sign", "hardtanh"): ("uniform", torch.sign, lambda x: x.clamp(-1, 1)),
    ("sign", "approx_sign"): (
        "triangular",
        torch.sign,
        lambda x: torch.where(x.abs() < 1, 2 * x - x * x.abs(), x.sign()),
    ),
    ("sign", "tanh"): ("logistic", torch.sign, torch.tanh),
}


@pytest.mark.parametrize("pair", WIDTHS)
def test_a_smoothed_operator_is_what_its_estimator_differentiates(pair: tuple[str, str]) -> None:
    name, operator, smooth = SMOOTHED[pair]
    u = DISTRIBUTIONS[name](torch.Size([200_000]), torch.Generator().manual_seed(0))
    x = torch.tensor([-1.3, -0.8, -0.3, 0.0, 0.2, 0.6, 1.4])
    found = operator(x[:, None] + WIDTHS[pair] * u).mean(-1)
    torch.testing.assert_close(found, smooth(x), rtol=0, atol=4 / 200_000**0.5)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_directions_have_mean_0_and_variance_1_and_a_seed_each(name: str) -> None:
    draw, like = DISTRIBUTIONS[name], torch.zeros(300, 400)
    u = direction(draw, 0, 1, 2, "A", like)
    assert abs(float(u.mean())) < 0.015 and float(u.var()) == pytest.approx(1, abs=0.03)
    assert torch.equal(u, direction(draw, 0, 1, 2, "A", like))
    for other in ((1, 1, 2, "A"), (0, 2, 2, "A"), (0, 1, 3, "A"), (0, 1, 2, "B")):
        v = direction(draw, *other, like)
        assert abs(float((u * v).mean())) < 0.02


# ------------------------------------------------------------------------------------------- values and codes


def values(model: Layer) -> Tensor:
    """v of the rows that are moved [N or R, K]."""
    base = model.packed
    grid = base.on_grid(model.adapter.grid_args(base))
    k, size = base.shape[1], base.grid.group_size
    with torch.no_grad():
        return ungrouped(grid_values(slice(0, grid.moved), grid, k, size), k)


@pytest.mark.parametrize("grid", [ROWS, GROUPS], ids=str)
@pytest.mark.parametrize("method", LOW_RANK)
def test_one_step_moves_values_by_one(method: str, grid: IntGrid) -> None:
    model = Layer(method, (96, 64), grid, rank=3, size=0.01 if method != "lr_qat" else 1.0)
    with torch.no_grad():
        model.packed.scale.mul_(40 if method != "lr_qat" else 1)  # so that B is not what holds A
        one = model.adapter.one_step(model.packed)
        assert set(one) >= {"A", "B"}
        start = values(model)
        for name in "AB":
            held = name == "A" and float(one["A"]) == pytest.approx(
                float(model.adapter.A.square().mean().sqrt())
            )
            tensor = model.adapter.get_parameter(name)
            kept = tensor.clone()
            tensor += 0.1 * one[name] * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
            moved = float((values(model) - start).square().mean().sqrt())
            assert moved == pytest.approx(0.1, rel=0.25) or (held and 0 < moved < 0.1), (name, held)
            tensor.copy_(kept)
        model.adapter.B.zero_()
        fresh = model.adapter.one_step(model.packed)
        assert float(fresh["A"]) == pytest.approx(float(model.adapter.A.square().mean().sqrt()))


@pytest.mark.parametrize("grid", [ROWS, GROUPS], ids=str)
@pytest.mark.parametrize("method", PULLED)
def test_between_codes_a_pull_shrinks_distances_by_its_share(method: str, grid: IntGrid) -> None:
    """(1 - lr lambda) per step, where the rows of A span everything; what is beyond the last code stays."""
    if method in LOW_RANK:
        model = Layer(method, (5, 32), grid, rank=32, size=1e-3)
        with torch.no_grad():
            model.adapter.A.copy_(torch.linalg.qr(torch.randn(32, 32))[0])
    else:
        model = Layer(method, (35, 32), grid, size=1.0)  # 16 rows of ef_qat's
        assert model.adapter.one_step(model.packed)["delta"] == 1.0
    made = making(model, total=4, rate=0.05)
    config = CageConfig.model_validate({"lambda": 4.0, "unit": "raw", "silence": 0.5, "schedule": "constant"})
    cage = GRADIENTS["backprop"](cage=config).make(made)
    top, v = grid.levels - 1, values(model)
    beyond = (v.round() < 0) | (v.round() > top)
    distances = [v - v.round().clamp(0, top)]
    for step in range(4):
        cage.after_step(window(lambda i: torch.zeros(()), step=step), {"lr": 0.05})
        v = values(model)
        distances.append(v - v.round().clamp(0, top))
    assert torch.equal(distances[2], distances[0]), "silence"
    for step in (2, 3):
        before, after = distances[step], distances[step + 1]
        torch.testing.assert_close(after[~beyond], 0.8 * before[~beyond], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(after[beyond], before[beyond], rtol=1e-3, atol=1e-4)


def test_a_pull_in_all_is_what_was_asked_for_and_never_past_a_code() -> None:
    made = making(Layer(), total=10, rate=0.01)
    for schedule in ("linear_ramp", "constant"):
        config = CageConfig.model_validate({"lambda": 0.9, "schedule": schedule})
        cage: Any = GRADIENTS["backprop"](cage=config).make(made)
        lambdas = [cage.scale * config.share(t, 10) for t in range(10)]
        assert 0.01 * sum(lambdas) == pytest.approx(0.9) and lambdas[7] == 0 < lambdas[8] <= lambdas[9]
    with pytest.raises(ValueError, match="must stay below 1"):
        GRADIENTS["backprop"](cage=CageConfig.model_validate({"lambda": 1.5})).make(made)


@pytest.mark.parametrize("skip", [True, False])
def test_a_coupled_pull_is_the_chain_rule_in_float64(skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 64)  # a row at a time
    model = Layer("lr_qat", (7, 64), GROUPS, rank=3, size=1.0)
    made = making(model, total=1, rate=0.05)
    cage = CageConfig.model_validate(
        {"lambda": 0.5, "unit": "raw", "form": "coupled", "silence": 0, "schedule": "constant"}
        | {"skip_clipped": skip}
    )
    GRADIENTS["backprop"](cage=cage).make(made).fill(
        window(lambda i: 0.0 * sum(p.sum() for p in made.trained.values()))  # type: ignore[return-value]
    )
    base, adapter = model.packed, model.adapter
    a, b = (adapter.get_parameter(n).detach().double().requires_grad_() for n in "AB")
    sign = torch.ones_like(base.scale).copysign(base.scale).t().double().repeat_interleave(32, 1)
    start = values(model).double() - (adapter.config.gain * b @ a).detach() * sign
    v = start + adapter.config.gain * (b @ a) * sign
    code = v.detach().round().clamp(0, 7)
    counted = ((v.detach().round() == code) | torch.tensor(not skip)).double()
    assert 0 < int((v.detach().round() != code).sum()) < v.numel() / 2
    (0.5 * 0.5 * ((v - code) * counted).square().sum()).backward()
    for name, want in (("A", a.grad), ("B", b.grad)):
        found = made.trained[f"linear.adapter.{name}"].grad
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)
