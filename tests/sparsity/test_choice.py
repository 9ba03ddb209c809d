"""Which weights each kind of quant.sparsity chooses, by its equation; and recipes that cannot be."""

from types import SimpleNamespace
from typing import Any

import lowbit_kernels as kernels
import pytest
import torch
from torch import Tensor

from lowbit_ft.grid import IntGrid, PackedWeight
from lowbit_ft.grid.calibrate import CALIBRATORS, Curvature, Stats
from lowbit_ft.plan.model import skeleton
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.sparsity import check_sparsity
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.sparsity import PATTERNS, SPARSITY, Asked
from tests.checkpoint_tools import TINY

N, K = 6, 264  # two whole blocks of columns and a short one
QUICK = "recipes/quickstart.yaml"


def problem() -> tuple[Tensor, Tensor]:
    """A weight [N, K] and sum x x^T of inputs of unlike sizes that know of each other."""
    x = torch.randn(600, 40) @ torch.randn(40, K) + torch.randn(600, K)
    x[:, ::5] *= 3
    return torch.randn(N, K), x.t() @ x


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("by_row", [False, True])
def test_the_lowest_scores_as_many_as_were_asked_for(name: str, by_row: bool) -> None:
    pattern, score = PATTERNS[name], torch.randint(0, 9, (N, K)).float()  # with many that are equal
    amount = pattern.amount or 0.3
    zeros = pattern.lowest(score, amount, by_row)
    assert pattern.holds(zeros)
    assert pattern.holds(torch.eye(4, dtype=torch.bool)) == (name == "unstructured"), "one zero in four"
    width = 4 if name == "1x4" else 1
    units = score.view(N, -1, width).sum(-1)
    chosen = zeros.view(N, -1, width)[..., 0]
    for part, taken in zip(units, chosen, strict=True) if by_row else [(units.flatten(), chosen.flatten())]:
        assert int(taken.sum()) == round(amount * len(part))
        if name != "2:4":
            assert part[taken].max() <= part[~taken].min()
    if name == "2:4":
        four, taken = score.view(-1, 4), zeros.view(-1, 4)
        assert (taken.sum(1) == 2).all()
        assert (
            four.where(taken, torch.tensor(-1.0)).amax(1) <= four.where(~taken, torch.tensor(99.0)).amin(1)
        ).all()


def test_wanda_compares_weight_times_input_within_a_row() -> None:
    weight, hessian = problem()
    zeros = SPARSITY["wanda"].zeros(weight, Asked(0.25, curvature=Curvature(hessian.clone())))
    score = weight.double().abs() * hessian.double().diagonal().sqrt()
    for row, taken in zip(score, zeros, strict=True):
        assert set(row.argsort()[: K // 4].tolist()) == set(taken.nonzero()[:, 0].tolist())
    plain = SPARSITY["magnitude"].zeros(weight, Asked(0.25))
    assert not torch.equal(plain, zeros) and int(plain.sum()) == round(0.25 * N * K)


def textbook(weight: Tensor, hessian: Tensor, width: int, choose: Any) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon in float64 by inverses, columns from the last to the first: a column is taken,
    those before it make up. choose(score [N, n]) of every `width` columns when their turn comes."""
    w, zeros = weight.double().clone(), torch.zeros_like(weight, dtype=torch.bool)
    hessian = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(K)
    inverses = [torch.linalg.inv(hessian[: i + 1, : i + 1]) for i in range(K)]
    for first in reversed(range(0, K, 128)):
        for start in reversed(range(first, min(first + 128, K), width)):
            span = range(start, min(start + width, first + 128, K))
            score = torch.stack([w[:, i] ** 2 / inverses[i][i, i] for i in span], 1)
            zeros[:, span.start : span.stop] = choose(score)
            for i in reversed(span):
                lost = torch.where(zeros[:, i], w[:, i], 0) / inverses[i][i, i]
                w[:, i] = torch.where(zeros[:, i], 0, w[:, i])
                w[:, :i] -= lost[:, None] * inverses[i][i, :i]
    return zeros, w


@pytest.mark.parametrize("name", ["unstructured", "2:4"])
def test_sparsegpt_is_the_surgeon_of_every_column_in_turn(name: str) -> None:
    weight, hessian = problem()
    pattern = PATTERNS[name]
    want, moved = textbook(
        weight, hessian, 128 if name == "unstructured" else 4, lambda s: pattern.lowest(s, 0.5)
    )
    asked = Asked(0.5, pattern, Curvature(hessian.clone() * 600))  # of 600 tokens: Curvature divides by one
    zeros, left = SPARSITY["sparsegpt"].start(weight, asked)
    assert (zeros == want).float().mean() > 0.995, "but for scores that are nearly equal"
    assert not left[zeros].any()
    if torch.equal(zeros, want):
        torch.testing.assert_close(left.double(), moved, rtol=1e-3, atol=1e-3)
    error = ((left - weight) @ hessian * (left - weight)).sum()
    pruned = weight.masked_fill(zeros, 0) - weight
    assert error < 0.7 * (pruned @ hessian * pruned).sum()


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_makes_up_for_locked_zeros(act_order: bool) -> None:
    """Less error than rounding what is left, on scales of what is left."""
    weight, hessian = problem()
    weight = weight * torch.where(torch.rand(N, K) < 0.5, 0.05, 1.0)  # half of them small: those go
    weight[:, 3] = 9.0  # one that would stretch every scale of its group, and matters little
    hessian[3] *= 0.01
    hessian[:, 3] *= 0.01
    zeros = SPARSITY["magnitude"].zeros(weight, Asked(0.5))
    zeros[:, 3] = True
    grid = IntGrid(bits=3, group_size=32, mask=True)
    stats = Stats(curvature=Curvature(hessian.clone()), zeros=zeros, act_order=act_order)
    base = CALIBRATORS["gptq"].run(weight, grid, stats)
    assert isinstance(base, PackedWeight) and not base.dequantize()[zeros].any()
    plain = CALIBRATORS["mse"].run(weight.masked_fill(zeros, 0), grid, Stats())

    def error(packed: Any) -> float:
        off = packed.dequantize() - weight
        return float((off @ hessian * off).sum())

    assert error(base) < 0.5 * error(plain)
    assert base.scale[0].float().abs().max() < 3, "no scale of a weight that is gone"
    assert base.masked(zeros).grid == grid


WRONG = [
    (
        {"kind": "locked", "amount": 0.3},
        {},
        "prunes nothing; remove it, or set kind: magnitude, wanda, sparsegpt",
    ),
    ({"kind": "magnitude", "amount": 0.3, "pattern": "2:4"}, {}, "pattern 2:4 is 0.5"),
    ({"kind": "none", "pattern": "2:4"}, {}, "kind: none has no zeros; remove it"),
    ({"kind": "locked"}, {"rotation": {"kind": "hadamard"}}, "leaves no zero; set rotation: {kind: none}"),
    ({"kind": "locked"}, {"grid": "binary", "bits": 2}, "has no zero: its levels are sums"),
    ({"kind": "wanda"}, {"calibrate": "signround"}, "set calibrate: gptq, or kind: magnitude"),
    ({"kind": "magnitude"}, {"calibrate": "recover"}, "set kind: locked"),
    (
        {"kind": "wanda"},
        {"calibrate": "from_checkpoint"},
        "set kind: locked (its codes at the zero point stay)",
    ),
    (
        {"kind": "sparsegpt", "pattern": "2:4"},
        {"calibrate": "gptq", "calibration": {"act_order": True}},
        "out of their order",
    ),
]


@pytest.mark.parametrize(("sparsity", "quant", "words"), WRONG, ids=[words for *_, words in WRONG])
def test_what_does_not_go_together_is_said(
    sparsity: dict[str, Any], quant: dict[str, Any], words: str
) -> None:
    section = QuantSection.model_validate({"sparsity": sparsity, **quant})
    (problem,) = check_sparsity(SimpleNamespace(quant=section))
    assert words in str(problem)
    good = QuantSection.model_validate({"sparsity": {"kind": "magnitude", "pattern": "2:4"}, "bits": 2})
    assert not list(check_sparsity(SimpleNamespace(quant=good)))


def test_a_recipe_is_refused_before_anything_is_loaded_and_plan_counts_the_bits() -> None:
    keys = ["quant.sparsity={kind: magnitude}", "quant.calibrate=mse"]
    with pytest.raises(RecipeError, match="lora.*use lr_qat, dl_qat or l4q, whose update is masked"):
        load_recipe(QUICK, [*keys, "adapter={method: lora}"])
    made = [skeleton(load_recipe(QUICK, more), TINY) for more in (keys, keys[1:])]
    wide = [
        kernels.packed_width(r.in_features, 1) * 2 * r.out_features for r in made[0].rows if r.reason is None
    ]
    assert made[0].held["mask"] == sum(wide) > 0 and made[1].held["mask"] == 0
    others = [{key: size for key, size in one.held.items() if key != "mask"} for one in made]
    assert others[0] == others[1]
    assert kernels.packed_width(4096, 1) * 2 == 4096 // 8, "a bit a weight: a sixteenth of bfloat16"
