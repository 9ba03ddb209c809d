"""The adapter section: a method against the grid and the layers."""

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.grid import IntGrid
from lowbit_ft.recipe.recipe import load_recipe
from tests.recipe.recipe_text import GOOD, bad_recipes, refused_with, write

BAD = [
    # (what, changed text, overrides, place and words that must be in one line)
    (
        "unknown method",
        ("lr_qat", "lr_qta"),
        (),
        "r.yaml:10: adapter.method: got 'lr_qta'; allowed: lr_qat, dl_qat",
    ),
    ("key of another method", ("rank: 8", "planes: all"), (), "r.yaml:11: adapter.planes: unknown key"),
    (
        "key of other methods",
        ("method: lr_qat\n  rank: 8", "method: ef_qat\n  segments: auto"),
        (),
        "r.yaml:11: adapter.segments: unknown key of ef_qat; lr_qat, dl_qat, l4q have it: remove it; allowed",
    ),
    (
        "bool for adapter number",
        ("rank: 8", "rank: true"),
        (),
        "r.yaml:11: adapter.rank: got 'true'; allowed: an integer",
    ),
    (
        "range",
        ("rank: 8", "rank: 0"),
        (),
        "r.yaml:11: adapter.rank: got 0; allowed: greater than or equal to 1",
    ),
    (
        "infinite",
        ("rank: 8", "alpha: .inf"),
        (),
        "r.yaml:11: adapter.alpha: got inf; allowed: a finite number",
    ),
    (
        "method against residual",
        ("lr_qat", "l4q"),
        ("quant.residual_bits=0",),
        "r.yaml:10: adapter.method: got 'l4q': l4q re-grids",
    ),
    (
        "warm-up as long as the run",
        ("lr_qat", "l4q\n  warmup_steps: 10"),
        (),
        "r.yaml:11: adapter.warmup_steps: got 10, but train.max_steps is 10",
    ),
    (
        "cheap gradients that cost more",
        ("rank: 8", "rank: 64\n  low_rank_gradient: factorised"),
        ("adapter.scale_grad_tokens=0.25",),
        "r.yaml:12: adapter.low_rank_gradient: got 'factorised', which with rank 64, group size 128 and "
        "scale_grad_tokens 0.25 costs 1.25 products",
    ),
    (
        "corrected from all tokens",
        ("rank: 8", "rank: 8\n  low_rank_gradient: corrected"),
        (),
        "costs 1.12 products of a layer's size where exact costs 1",
    ),
    (
        "drawn tokens beside exact",
        ("rank: 8", "rank: 8\n  scale_grad_tokens: 0.5"),
        (),
        "scale_grad_tokens 0.5 with low_rank_gradient exact, whose third GEMM is of all tokens",
    ),
    (
        "no tokens drawn",
        ("lr_qat\n  rank: 8", "scale\n  scale_grad_tokens: 0"),
        (),
        "r.yaml:11: adapter.scale_grad_tokens: got 0; allowed: greater than 0",
    ),
    (
        "alpha_tuning on integers",
        ("lr_qat\n  rank: 8", "alpha_tuning"),
        (),
        "r.yaml:10: adapter.method: got 'alpha_tuning', which works on quant.grid: binary; the recipe has "
        "integer; set quant.grid: binary",
    ),
    (
        "integer method on planes",
        ("bits: 4", "grid: binary\n  bits: 3"),
        (),
        "adapter.method: got 'lr_qat', which works on quant.grid: integer",
    ),
]


@bad_recipes(BAD)
def test_bad_recipe_is_refused_with_its_line(change, overrides, words):
    refused_with(change, overrides, words)


def test_cheaper_gradients_where_they_are_cheaper():
    """Row-wise frozen grids need no tokens for their scales, and a live grid no groups for A and B."""
    cheap = ("adapter.low_rank_gradient=factorised",)
    load_recipe(write(GOOD), (*cheap, "adapter.scale_grad_tokens=0.25"))
    load_recipe(write(GOOD), (*cheap, "quant.group_size=-1"))
    load_recipe(write(GOOD), (*cheap, "adapter.train_scale=false"))
    load_recipe(
        write(GOOD),
        (
            "adapter={method: l4q, rank: 64, low_rank_gradient: corrected, scale_grad_tokens: 0.5}",
            "quant.group_size=32",
        ),
    )
    load_recipe(write(GOOD), ("adapter={method: scale, scale_grad_tokens: 0.25}", "train.keep_codes=true"))
    costs = [
        (ADAPTERS["lr_qat"](rank=16), 128, 1.0),
        (ADAPTERS["lr_qat"](rank=16, low_rank_gradient="factorised", scale_grad_tokens=0.25), 128, 0.5),
        (ADAPTERS["dl_qat"](rank=16, low_rank_gradient="factorised", scale_grad_tokens=0.25), -1, 0.0),
        (ADAPTERS["dl_qat"](rank=16, low_rank_gradient="corrected", scale_grad_tokens=0.25), -1, 0.25),
        (ADAPTERS["l4q"](rank=16, low_rank_gradient="factorised", scale_grad_tokens=0.25), 32, 0.25),
        (ADAPTERS["lr_qat"](rank=16, low_rank_gradient="factorised", train_scale=False), 64, 0.5),
    ]
    assert [c.gradient_cost(IntGrid(group_size=g)) for c, g, _ in costs] == [cost for _, _, cost in costs]
