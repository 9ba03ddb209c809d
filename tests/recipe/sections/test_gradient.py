"""train.gradient: what each kind needs, and what it does not go with."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.gradients import GRADIENTS
from lowbit_ft.plan.fixes import changed
from lowbit_ft.recipe.recipe import load_recipe
from tests.recipe.recipe_text import GOOD, bad_recipes, refused_with

ZEROTH, FOGZO = "train.gradient={kind: zeroth_order}", "train.gradient={kind: fogzo}"
SCALES = "train.gradient={kind: zeroth_order, scope: scales}"
CAGE = "train.gradient={cage: {}}"
SCALE, LORA = "adapter={method: scale}", "adapter={method: lora}"
NONE = ("name: test", "name: test")
BAD = [
    # (what, changed text, overrides, place and words that must be in one line)
    (
        "kind",
        NONE,
        ("train.gradient={kind: fogzzo}",),
        "train.gradient: got 'fogzzo'; allowed: kind: backprop, fogzo, zeroth_order; did you mean 'fogzo'?",
    ),
    (
        "key of another kind",
        NONE,
        ("train.gradient={kind: fogzo, eps: 0.1}",),
        "train.gradient.eps: unknown key; allowed: kind, cage, probes, kappa_end",
    ),
    (
        "key without a kind",
        NONE,
        ("train.gradient={probes: 2}",),
        "train.gradient.probes: unknown key; allowed: kind, cage",
    ),
    (
        "key of cage",
        NONE,
        ("train.gradient={cage: {lamda: 3}}",),
        "train.gradient.cage.lamda: unknown key; did you mean 'lambda'?; allowed: lambda, unit, silence",
    ),
    (
        "value of cage",
        NONE,
        ("train.gradient={cage: {lambda: 0}}",),
        "train.gradient.cage.lambda: got 0; allowed: greater than 0",
    ),
    (
        "coupled pull",
        NONE,
        ("train.gradient={cage: {form: coupled}}",),
        "train.gradient.cage: got form coupled with unit pull, which counts what the learning rate pulls",
    ),
    (
        "coupled with an estimate",
        NONE,
        ("train.gradient={kind: fogzo, cage: {form: coupled, unit: raw}}",),
        "train.gradient.cage.form: got 'coupled' with kind: fogzo, whose estimate is scaled otherwise",
    ),
    (
        "cage, lora",
        NONE,
        (CAGE, LORA),
        "train.gradient.cage: got gradient.cage, but lora trains nothing that is rounded",
    ),
    (
        "cage, scale",
        NONE,
        (CAGE, SCALE),
        "train.gradient.cage: got gradient.cage, but scale trains nothing that is rounded",
    ),
    (
        "fogzo, lora",
        NONE,
        (FOGZO, LORA),
        "train.gradient.kind: got gradient.kind: fogzo, but lora trains nothing",
    ),
    (
        "fogzo, planes",
        NONE,
        (FOGZO, "adapter={method: alpha_tuning}", "quant={grid: binary}"),
        "train.gradient.kind: got gradient.kind: fogzo, but alpha_tuning trains nothing that is rounded",
    ),
    (
        "cage, warm-up",
        NONE,
        (CAGE, "adapter={method: l4q, warmup_steps: 3}"),
        "adapter.warmup_steps: got 3 beside gradient.cage: a warm-up rounds nothing and uses no scales",
    ),
    (
        "fogzo, fp16",
        NONE,
        (FOGZO, "train.mixed_precision=fp16"),
        "train.mixed_precision: got 'fp16', whose scaler scales the gradient",
    ),
    (
        "zeroth order, fp16",
        NONE,
        (ZEROTH, "train.mixed_precision=fp16"),
        "train.mixed_precision: got 'fp16', whose loss scaler is for a backward",
    ),
    (
        "zeroth order, recomputation",
        NONE,
        (ZEROTH, "train.gradient_checkpointing=true", "train.offload=cpu"),
        "train.gradient_checkpointing: got true, but gradient.kind: zeroth_order keeps nothing for a",
    ),
    (
        "zeroth order, kept codes",
        NONE,
        (ZEROTH, "train.keep_codes=true"),
        "train.keep_codes: got true, but gradient.kind: zeroth_order moves the weights between any two",
    ),
    (
        "zeroth order, rate",
        NONE,
        (ZEROTH, "train.learning_rate=auto"),
        "train.learning_rate: got auto, which was searched with backprop",
    ),
    (
        "zeroth order, clipping",
        NONE,
        (ZEROTH, "train.max_grad_norm=0.3"),
        "train.max_grad_norm: got 0.3, but gradient.kind: zeroth_order clips nothing",
    ),
    (
        "zeroth order, shards",
        NONE,
        (ZEROTH, "train.sharding=fsdp"),
        "train.sharding: got 'fsdp' with gradient: zeroth_order, which reads whole tensors",
    ),
    (
        "cage, shards",
        NONE,
        (CAGE, "train.sharding=fsdp"),
        "train.sharding: got 'fsdp' with gradient: cage, which reads whole tensors",
    ),
    (
        "zeroth order, warm-up",
        NONE,
        (ZEROTH, "adapter={method: l4q, warmup_steps: 3}"),
        "adapter.warmup_steps: got 3 beside gradient.kind: zeroth_order: a warm-up rounds nothing",
    ),
    (
        "cage, too strong",
        NONE,
        ("train.learning_rate=1e-2", "train.gradient={cage: {lambda: 100000, unit: raw}}"),
        "train.gradient.cage: got lambda 100000.0: a step pulls by learning rate x lambda",
    ),
    (
        "scales alone, held",
        NONE,
        (SCALES, "adapter={method: lr_qat, train_scale: false}"),
        "train.gradient.scope: got 'scales', but lr_qat trains none here; set scope: adapters",
    ),
    (
        "scales alone, a dense part",
        NONE,
        (SCALES, "adapter={method: full_qat}"),
        "train.gradient.scope: got 'scales' with adapter full_qat, whose dense part would be held",
    ),
    (
        "scales alone, a pull",
        NONE,
        ("train.gradient={kind: zeroth_order, scope: scales, cage: {}}", "adapter={method: lr_qat}"),
        "train.gradient.cage: got a pull of what moves codes beside scope: scales",
    ),
    (
        "rows chosen too late",
        NONE,
        ("adapter={method: ef_qat, refresh_steps: 9}", "train.max_steps=9", "train.epochs=null"),
        "adapter.refresh_steps: got 9 with train.max_steps 9: the rows would never be chosen anew",
    ),
    (
        "rows chosen behind the only step",
        NONE,
        ("adapter={method: ef_qat, importance: weight_input}", "train.max_steps=1", "train.epochs=null"),
        "train.max_steps: got 1, but adapter ef_qat chooses its rows anew between steps",
    ),
    (
        "scales alone, lora",
        NONE,
        (SCALES, LORA),
        "train.gradient.scope: got 'scales', but lora trains none here; set scope: adapters",
    ),
]


def test_scales_alone_may_be_those_of_inputs() -> None:
    """Learned scales of inputs train where those of the weights do not."""
    train = SimpleNamespace(
        gradient_checkpointing=False,
        keep_codes=False,
        mixed_precision="no",
        model_fields_set={"learning_rate"},
        max_grad_norm=1.0,
        sharding="none",
    )
    held = ADAPTERS["lr_qat"].model_validate({"method": "lr_qat", "train_scale": False})
    way = GRADIENTS["zeroth_order"].model_validate({"kind": "zeroth_order", "scope": "scales"})
    for learn, count in ((True, 0), (False, 1)):
        quant = SimpleNamespace(activations=SimpleNamespace(learn=learn))
        recipe = SimpleNamespace(train=train, adapter=held, quant=quant)
        assert len(list(way.problems(recipe))) == count


@bad_recipes(BAD)
def test_bad_recipe_is_refused_with_its_line(change, overrides, words):
    refused_with(change, overrides, words)


@pytest.mark.parametrize(
    "gradient",
    [
        "{}",
        "{cage: {lambda: 1e1, unit: raw, silence: 0.5, schedule: constant, skip_clipped: false}}",
        "{kind: fogzo, probes: 2, kappa_end: 1e-1, start: 0, smoothing: normal, cage: {}}",
        "{kind: zeroth_order, probes: 2, eps: 1e-1, scope: scales, momentum: 0.9}",
    ],
)
def test_a_recipe_comes_back_as_it_was_written(gradient: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    recipe = load_recipe(tmp_path / "r.yaml", [f"train.gradient={gradient}", "train.learning_rate=1e-3"])
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe
    again = yaml.safe_load(recipe.to_yaml())["train"]["gradient"]
    assert again["kind"] == ("backprop" if "kind" not in gradient else recipe.train.gradient.kind)
    assert ("lambda" in again["cage"]) if "cage" in gradient else again["cage"] is None
    fixed = changed(recipe, {"train.micro_batch_size": 3})
    assert fixed is not None and fixed.train.gradient == recipe.train.gradient
