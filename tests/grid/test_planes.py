"""Starts on sign planes: greedy, alternating, and LLM-QAT's mean, by their equations."""

import pytest
import torch

from lowbit_ft.export.planes import tied, to_integers
from lowbit_ft.grid import BinaryGrid, BinaryWeight
from lowbit_ft.grid.estimators import SMALLEST_SCALE
from tests.grid.test_calibrate import BINARY_GRIDS, SHAPE, group_error, run, weights

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("grid", BINARY_GRIDS, ids=str)
def test_alternating_is_never_worse_than_greedy(grid: BinaryGrid):
    weight = weights()
    greedy = group_error(weight, run("greedy", weight, grid))
    alternating = group_error(weight, run("alternating", weight, grid))
    assert alternating.sum() <= greedy.sum() * (1 + 1e-4)
    assert (alternating <= greedy * 1.02).all()  # the ridge and bf16 scales
    if grid.bits > 1:
        assert alternating.sum() < 0.98 * greedy.sum()


def test_greedy_is_the_recurrence():
    grid, weight = BinaryGrid(bits=3, group_size=-1), weights((4, 50))
    packed = run("greedy", weight, grid)
    assert isinstance(packed, BinaryWeight)
    rest, signs = weight.double(), packed.unpack_codes().double() * 2 - 1
    for k in range(3):
        b = torch.where(rest >= 0, 1.0, -1.0).double()
        alpha = rest.abs().mean(1, keepdim=True)
        assert torch.equal(signs[k], b)
        torch.testing.assert_close(packed.scale[k, 0].double(), alpha[:, 0], rtol=2**-8, atol=0)
        rest = rest - alpha * b


@pytest.mark.parametrize(("bits", "group"), [(1, -1), (1, 64), (2, -1), (2, 64)])
def test_mean_has_the_levels_of_llm_qat(bits: int, group: int):
    """Number by number, in float64; 200 inputs: the last group of 64 has 8."""
    weight, grid = weights(), BinaryGrid(bits=bits, group_size=group)
    weight[0, :9], weight[1] = 0.0, 0.0
    packed = run("mean", weight, grid)
    found, size = packed.dequantize(), SHAPE[1] if group == -1 else group
    for n, row in enumerate(weight.double().tolist()):
        for start in range(0, SHAPE[1], size):
            part = row[start : start + size]
            m = max(sum(map(abs, part)) / len(part), 2 * SMALLEST_SCALE)
            m = float(torch.tensor(m, dtype=torch.float32).bfloat16())
            for i, w in enumerate(part):
                u, s = max(-0.99, min(0.99, w / (2 * m))), 2 * m
                wanted = s * (round(2 * u - 0.5) + 0.5) / 2 if bits == 2 else (m if w >= 0 else -m)
                assert float(found[n, start + i]) == wanted, (n, start + i)
    units = found[2:, :64] / packed.scale.float()[0, 0, 2:, None]
    assert set(units.flatten().tolist()) == ({-1.5, -0.5, 0.5, 1.5} if bits == 2 else {-1.0, 1.0})


def test_mean_is_an_integer_grid_of_one_bit_more():
    """So formats without planes hold it, while no plane was trained apart."""
    weight = weights()
    for bits in (1, 2):
        packed = run("mean", weight, BinaryGrid(bits=bits, group_size=64))
        assert isinstance(packed, BinaryWeight) and tied(packed)
        assert torch.equal(to_integers(packed).dequantize(), packed.dequantize())


def test_alternating_planes_are_ordered_by_size():
    scale = run("alternating", weights(), BinaryGrid(bits=3, group_size=64)).scale.float()
    assert (scale[0] >= scale[1]).float().mean() > 0.95 and (scale > 0).all()
