"""quant.rotation and quant.smooth: what a recipe may say of them."""

from pathlib import Path

import pytest

from lowbit_ft.recipe.recipe import load_recipe
from tests.architectures import CONFIGS, checkpoint_of
from tests.recipe.recipe_text import GOOD, bad_recipes, problems_with, refused_with, write

R = "quant.rotation."
BAD = [
    # (what, changed text, overrides, words that must be in one line)
    ("kind", ("", ""), (f"{R}kind=hadamart",), "allowed: none, hadamard, adaptive; did you mean 'hadamard'"),
    ("site", ("", ""), (f"{R}sites.r5=true",), "quant.rotation.sites.r5: unknown key"),
    ("smooth", ("", ""), ("quant.smooth=2",), "quant.smooth: got 2"),
    (
        "nothing to turn",
        ("", ""),
        (f"{R}kind=hadamard", f"{R}sites.r1=false", f"{R}sites.r2=false"),
        "quant.rotation.sites: all are false; set one to true, or kind: none",
    ),
    (
        "r4 in a format without its op",
        ("", ""),
        (f"{R}kind=hadamard", f"{R}sites.r4=true"),
        "transformers reads past that and computes other logits, and vLLM raises under tensor parallelism",
    ),
    (
        "r3 without a cache that rounds",
        ("", ""),
        (f"{R}kind=hadamard", f"{R}sites.r3=true", "export.format=native"),
        "quant.rotation.sites.r3: got true, but nothing rounds the keys; set quant.kv_cache, or r3: false",
    ),
    (
        "r3 where the cache rotates",
        ("", ""),
        (f"{R}kind=hadamard", f"{R}sites.r3=true", "export.format=native", "quant.kv_cache.bits=4"),
        "this cache rotates keys and values by itself",
    ),
    (
        "r3 in a format of a server",
        ("", ""),
        (f"{R}kind=hadamard", f"{R}sites.r3=true", "quant.kv_cache.bits=8"),
        "no server of compressed-tensors turns keys before it caches them; set r3: false",
    ),
    (
        "inputs decide, and are not rounded",
        ("", ""),
        (f"{R}kind=adaptive", f"{R}criterion=activations"),
        "quant.rotation.criterion: got 'activations', but inputs stay in 16 bits; set quant.activations",
    ),
]


@bad_recipes(BAD)
def test_bad(change: tuple[str, str], overrides: tuple[str, ...], words: str, tmp_path: Path) -> None:
    refused_with(change, overrides, words)


@pytest.mark.parametrize(
    "overrides",
    [
        (f"{R}kind=hadamard",),
        (f"{R}kind=adaptive", f"{R}sites.r4=true", "export.format=native", "quant.smooth=auto"),
        (f"{R}kind=hadamard", f"{R}sites.r3=true", "quant.kv_cache.bits=8", "export.format=native"),
        ("quant.smooth=0.5",),
    ],
)
def test_good(overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write(GOOD), ("quant.calibrate=mse", *overrides))
    assert recipe.quant.folds
    assert recipe.quant.reads_rows == ("hadamard" not in str(overrides))


def test_by_default_nothing_is_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quant = load_recipe(write(GOOD), ("quant.calibrate=mse",)).quant
    assert not quant.folds and not quant.reads_rows and quant.rotation.kind == "none"


@pytest.mark.parametrize(
    ("name", "site", "words"),
    [
        ("gemma2", "r1", "gemma2: a norm with a gain stands between"),
        ("qwen3_next", "r2", "qwen3_next: a gate multiplies"),
        ("mixtral", "r4", "the inputs of a mixture's experts are not rotated"),
        ("jetmoe", "r1", "jetmoe is no architecture"),
    ],
)
def test_models_are_refused_by_what_their_config_says(
    name: str, site: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint_of(CONFIGS[name](), tmp_path / "model")
    sites = [f"{R}sites.{other}={str(other == site).lower()}" for other in ("r1", "r2", "r4")]
    given = (f"model.path={tmp_path / 'model'}", "export.format=native", f"{R}kind=hadamard", *sites)
    problems = [line for line in problems_with(GOOD, given) if "rotation" in line]
    assert len(problems) == 1 and words in problems[0], problems
    others = [line for line in problems_with(GOOD, given[:2]) if "rotation" in line]
    assert not others
