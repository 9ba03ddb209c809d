"""signround: one step against float64, its law of residuals, and that it is worth having."""

import sys
from typing import Any

import pytest
import torch
from lowbit_kernels.pack import decode_residual
from torch import Tensor

from lowbit_ft.grid import IntGrid, PackedWeight
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.grid.calibrate.signround import NARROWEST, Rounding, signround_block
from lowbit_ft.grid.estimators import round_clip
from tests import reference

GRIDS = [
    IntGrid(bits=b, group_size=g, symmetric=s, scale_dtype=d)
    for b, g, s, d in (
        (2, 32, True, "float32"),
        (2, 64, False, "float32"),
        (3, -1, False, "float32"),
        (4, 64, True, "float32"),
    )
]


class Linear:
    """|X (W^ - W)^T|^2 / tokens over some batches: a block of one linear."""

    def __init__(self, weight: Tensor, grid: IntGrid, inputs: list[Tensor]):
        self.weights, self.grids, self.inputs = {"w": weight}, {"w": grid}, inputs
        self.batches, self.asked, self.zeros = len(inputs), [], {}

    def loss(self, number: int, weights: Any) -> Tensor:
        if torch.is_grad_enabled():
            self.asked.append(number)
        x = self.inputs[number].to(weights["w"].dtype)
        return (x @ (weights["w"] - self.weights["w"].to(x.dtype)).t()).square().sum() / len(x)


def problem(grid: IntGrid, k: int = 100, batches: int = 3) -> Linear:
    weight = torch.distributions.StudentT(4.0).sample((7, k)) * 0.05 + 0.01
    mix = torch.randn(24, k)
    return Linear(
        weight, grid, [torch.randn(40, 24) @ mix + 0.3 * torch.randn(40, k) for _ in range(batches)]
    )


def slow_step(block: Linear, rounding: Rounding, rate: float) -> dict[str, Tensor]:
    """One step in float64 from the equations of the docstring, on weights [N, K]."""
    grid, weight = block.grids["w"], block.weights["w"].double()
    n, k = weight.shape
    size, top = k if grid.group_size == -1 else grid.group_size, grid.levels - 1
    p = {name: t.detach().double().clone().requires_grad_() for name, t in rounding.trained.items()}
    parts = []
    for g, piece in enumerate(weight.split(size, dim=1)):
        v = p["offset"][:, g, : piece.shape[1]]
        if grid.symmetric:
            s = p["alpha"][:, g] * piece.abs().amax(1).copysign(rounding.high[:, g]) / (top / 2)
            z = torch.full_like(s, grid.levels // 2)
        else:
            high, low = (
                piece.amax(1).clamp_min(0) * p["alpha"][:, g],
                piece.amin(1).clamp_max(0) * p["beta"][:, g],
            )
            s = (high - low) / top
            z = reference.ste_round((-low / s).clamp(0, top))
        s, z = s[:, None], z[:, None]
        inside = (piece / s + v + z).clamp(0, top)
        parts.append(s * (reference.ste_round(inside) - z))
    block.loss(0, {"w": torch.cat(parts, 1)}).backward()
    out = {}
    for name, t in p.items():
        low, high = (-0.5, 0.5) if name == "offset" else (NARROWEST, 1.0)
        assert t.grad is not None
        out[name] = (t - rate * t.grad.sign()).detach().clamp(low, high)
    return out


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_one_step_is_its_equation_in_float64(grid: IntGrid) -> None:
    block = problem(grid, batches=1)
    rounding = Rounding(block.weights["w"], grid)
    start = {name: t.detach().clone() for name, t in rounding.trained.items()}
    wanted = slow_step(block, rounding, 0.1)
    block.loss(0, {"w": rounding.weight()}).backward()
    rounding.step(0.1)
    assert (
        set(wanted) == set(rounding.trained) == ({"offset", "alpha"} | ({"beta"} - {"beta" * grid.symmetric}))
    )
    for name, tensor in rounding.trained.items():
        k = block.weights["w"].shape[1]
        same = (tensor.double() - wanted[name]).abs() < 1e-6
        if name == "offset":
            same = same.flatten(1)[:, :k]
        # a gradient that is a sum near zero may have another sign in float32
        assert same.float().mean() > 0.99, name
        assert not torch.equal(tensor, start[name])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_nearer_than_its_start_and_the_base_belongs_to_it(bits: int, symmetric: bool) -> None:
    """The loss falls below the clipping search's, is what the packed weight gives, and the residual lies
    within its code."""
    grid = IntGrid(bits=bits, group_size=32, symmetric=symmetric)
    block = problem(grid)
    made, (before, after) = signround_block(block, Stats(steps=60))
    packed = made["w"]
    assert isinstance(packed, PackedWeight) and packed.grid == grid

    def loss(weight: Tensor) -> float:
        with torch.no_grad():
            return sum(float(block.loss(n, {"w": weight})) for n in range(3)) / 3

    mse = CALIBRATORS["mse"].run(block.weights["w"], grid, Stats(p=2.0))
    assert before == pytest.approx(loss(mse.dequantize()), rel=0.1)  # it starts at the search's ranges
    assert after < 0.8 * before
    assert loss(packed.dequantize()) == pytest.approx(after, rel=1e-3)
    assert packed.residual is not None
    rest = decode_residual(packed.residual, grid.residual_bits, 100)
    assert rest.abs().max() <= 0.5 and rest.std() > 0.1
    assert sorted(block.asked) == [0] * 20 + [1] * 20 + [2] * 20 and block.asked != sorted(block.asked)


def test_the_best_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps that only do harm the start is what is packed."""
    grid = IntGrid(bits=2, group_size=32)
    block = problem(grid)
    start = Rounding(block.weights["w"], grid).packed()
    whole = Rounding.step
    monkeypatch.setattr(Rounding, "step", lambda self, rate: whole(self, -50 * rate))
    made, (before, after) = signround_block(block, Stats(steps=8))
    assert before == after and made["w"].digest() == start.digest()


def test_seeds_and_steps_count() -> None:
    block = problem(IntGrid(bits=2, group_size=32))
    digests = [
        signround_block(block, Stats(steps=steps, seed=seed))[0]["w"].digest()
        for steps, seed in ((8, 0), (8, 0), (8, 1), (9, 0))
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_without_text_it_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="signround needs calibration text"):
        CALIBRATORS["signround"].run(torch.randn(4, 64), IntGrid(), Stats())


def by_autograd(rounding: Rounding) -> Tensor:
    """W^ of the docstring's equation, one differentiable operation after another."""
    scale, zero = (t.unsqueeze(-1) if isinstance(t, Tensor) else t for t in rounding.range())
    assert isinstance(scale, Tensor)
    code = round_clip(rounding.groups / scale + rounding.trained["offset"] + zero, 0, rounding.top)
    return ((code - zero) * scale).reshape(len(code), -1)[:, : rounding.width]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_weight_in_chunks_has_autograds_bits(grid: IntGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients, over steps that move offsets and ranges; the last chunk is not full."""
    monkeypatch.setattr(sys.modules[Rounding.__module__], "CACHED", 3 * 128)
    weight = problem(grid).weights["w"]
    ours, theirs = Rounding(weight, grid), Rounding(weight, grid)
    for _ in range(5):
        wanted = torch.randn_like(weight)
        made, slow = ours.weight(), by_autograd(theirs)
        assert torch.equal(made, slow)
        torch.autograd.backward([made, slow], [wanted, wanted])
        for name, tensor in ours.trained.items():
            other = theirs.trained[name]
            assert tensor.grad is not None and other.grad is not None and other.grad.any()
            assert torch.equal(tensor.grad, other.grad), name
        for rounding in (ours, theirs):
            rounding.step(0.4)


def test_nothing_of_the_weights_size_is_kept_for_the_backward() -> None:
    """Calibrator.block_bytes counts on it."""
    rounding, kept = Rounding(problem(GRIDS[0]).weights["w"], GRIDS[0]), []
    own = {t.data_ptr() for t in (rounding.groups, *rounding.trained.values())}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rounding.weight()
    assert any(t.numel() == rounding.groups.numel() for t in kept)
    assert all(t.data_ptr() in own for t in kept if t.numel() >= rounding.groups.numel())
