"""Zeros that come while a model trains (quant.sparsity.schedule); runs with zeros, stopped midway."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lowbit_kernels as kernels
import pytest
import torch
from peft import PeftModel

from lowbit_ft.adapters.attach import (
    adapted_layers,
    adapter_state,
    base_digest,
    begin_step,
    load_adapter_state,
    prune_by,
    zeros_of,
)
from lowbit_ft.adapters.pruned import Pruned, unrounded
from lowbit_ft.grid import IntGrid, PackedWeight
from lowbit_ft.integrations.adapter_files import read_adapter, write_adapter
from lowbit_ft.plan.model import skeleton
from lowbit_ft.plan.pruned import choice_moments
from lowbit_ft.quantize.direct import Direct
from lowbit_ft.quantize.memory import PRUNE_BYTES
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.sparsity import check_schedule, check_sparsity
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.sparsity import Gradual
from tests.checkpoint_tools import TINY
from tests.loop_tools import digest, go, losses, stop_at
from tests.packed_tools import adapted_llama, adapter_config
from tests.toy import batches

STEPS, GRID = 4, IntGrid(bits=4, group_size=32)
BY = Gradual.of("magnitude", 0.9, "unstructured", STEPS, start=0.0, end=0.6, every=1)
METHODS = ["full_qat", "lr_qat", "l4q"]


def llama(method: str, seed: int = 1, by: Gradual | None = BY, **own: Any) -> Any:
    model = adapted_llama(
        adapter_config(method, **own),
        GRID,
        seed=seed,
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=64,
    )
    if by is not None:
        prune_by(model, by)
    return model


def run(
    folder: Path, model: Any, at: int | None = None, seen: list[Any] | None = None, **changes: Any
) -> Any:
    def on_step(step: int) -> Any:
        if at is not None:
            stop_at(at)(step)
        before = {n: latent(layer) for n, layer in adapted_layers(model)} if seen is not None else {}
        carried = begin_step(model, step)
        if seen is not None:
            masks = {n: mask_of(layer) for n, layer in adapted_layers(model)}
            seen.append((step, before, masks))
        return carried

    keys = {"max_steps": STEPS, "learning_rate": 0.1, "gradient_accumulation_steps": 1} | changes
    go(folder, model, batches(), on_step=on_step, **keys)
    return model


def latent(layer: Any) -> torch.Tensor:
    with torch.no_grad():
        return unrounded(layer.base, layer.adapter.grid_args(layer.base))


def mask_of(layer: Any) -> torch.Tensor:
    n, k = layer.adapter.shape
    mask = layer.base.__class__(**{**vars(layer.base), "mask": layer.adapter.mask}).locked
    assert mask.shape == (n, k)
    return mask


def test_the_share_is_the_cubic_one_and_ends_at_the_amount() -> None:
    by = Gradual.of("magnitude", 0.85, "unstructured", 100, start=0.1, end=0.5, every=15)
    want = {t: 0.85 * (1 - (1 - (t - 10) / 40) ** 3) for t in (10, 25, 40)} | {50: 0.85}
    got = {t: share for t in range(100) if (share := by.share(t)) is not None}
    assert got == pytest.approx(want) and got[10] == 0 and got[50] == 0.85
    late = Gradual.of("magnitude", 0.5, "1x4", 3, start=0.0, end=1.0, every=100)
    assert [late.share(t) for t in range(3)] == [0.0, None, 0.5], "the last step trains with all of them"
    assert Gradual.of("magnitude", 0.5, "1x4", 1, start=0.0, end=0.5, every=1).share(0) == 0.5


def test_a_model_with_nothing_to_prune_is_refused_before_it_trains() -> None:
    """Its share of zeros, told behind the last step, would be of no weights."""
    with pytest.raises(ValueError, match="no packed layer but the head, which is not pruned"):
        prune_by(torch.nn.Module(), BY)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_are_the_smallest_weights_of_their_step_and_what_is_trained_is_what_ships(
    method: str, tmp_path: Path
) -> None:
    model, seen = llama(method), []
    dense = base_digest(model)
    run(tmp_path, model, seen=seen)
    counts: dict[str, torch.Tensor] = {}
    for step, before, masks in seen:
        share = BY.share(step)
        for name, mask in masks.items():
            size = before[name].abs()
            if share is not None:
                assert int(mask.sum()) == round(share * mask.numel())
                assert share == 0 or size[mask].max() <= size[~mask].min()
            else:
                assert torch.equal(mask, counts[name])
            assert int(mask.sum()) >= int(counts.get(name, mask).sum()), "the count never falls"
            counts[name] = mask
    assert base_digest(model) == dense, "the base stays dense, and a teacher in it"
    assert zeros_of(model) == {n: (round(0.9 * m.numel()), m.numel()) for n, m in counts.items()}
    for name, layer in adapted_layers(model):
        mask, adapter = counts[name], layer.adapter
        assert isinstance(adapter, Pruned)
        eye = torch.eye(adapter.shape[1])
        y = adapter(eye, layer.base)
        merged = adapter.merge(layer.base)
        assert isinstance(merged, PackedWeight) and merged.mask is None
        assert torch.equal(merged.dequantize(), y.detach().t())
        assert not merged.dequantize()[mask].any() and merged.dequantize()[~mask].any()
        if method == "full_qat":
            (gradient,) = torch.autograd.grad(y.sum(), adapter.delta)
            assert not gradient[mask].any() and gradient[~mask].any()
            # Chosen anew: of those that are zero the largest come back when others have become smaller.
            back = latent(layer).abs().where(mask, torch.tensor(-1.0)).argmax()
            with torch.no_grad():
                adapter.delta[~mask] -= (latent(layer) / layer.base.scale.t().repeat_interleave(32, 1))[~mask]
            adapter.choose_zeros(layer.base, 0.1)
            assert adapter.zero_count == int(mask.sum()), "a longer run asks for fewer: the count never falls"
            assert mask.view(-1)[back] and not mask_of(layer).view(-1)[back]


@pytest.mark.parametrize(("method", "master", "at"), [("full_qat", "bf16", 1), ("lr_qat", None, 0)])
def test_a_run_stopped_midway_resumes_bit_equal(
    method: str, master: str | None, at: int, tmp_path: Path
) -> None:
    """Right behind a choice, and right before one; A is drawn anew, and the zeros are those of the file."""
    own: dict[str, Any] = {} if master is None else {"master": master}
    straight = run(tmp_path / "a", llama(method, **own))
    run(tmp_path / "b", llama(method, **own), at)
    again = run(tmp_path / "b", llama(method, seed=2, **own), resume=True)
    one, two = adapter_state(straight), adapter_state(again)
    assert any(key.endswith(".zeros") for key in one) and one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert digest(tmp_path / "a", STEPS) == digest(tmp_path / "b", STEPS)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("pruned"), llama("full_qat"), max_steps=STEPS)


def test_the_zeros_travel_in_the_adapter_folder_and_are_checked_there(pruned: Any, tmp_path: Path) -> None:
    config = adapter_config("full_qat")
    write_adapter(tmp_path / "adapter", adapter_state(pruned), config, base_digest(pruned), tmp_path)
    _, state, _ = read_adapter(tmp_path / "adapter")
    again = llama("full_qat", by=None)
    load_adapter_state(again, state)
    for (name, layer), (_, own) in zip(adapted_layers(pruned), adapted_layers(again), strict=True):
        assert layer.adapter.merge(layer.base).digest() == own.adapter.merge(own.base).digest(), name
    assert zeros_of(again) == zeros_of(pruned)
    bare = llama("full_qat", by=None)
    for _, layer in list(adapted_layers(bare)):
        layer.adapter = None
    peft = PeftModel.from_pretrained(bare, str(tmp_path / "adapter")).merge_and_unload()
    for name, layer in adapted_layers(pruned):
        merged = peft.get_submodule(name).base
        assert torch.equal(merged.codes, layer.adapter.merge(layer.base).codes), name
    key = next(key for key in state if key.endswith("k_proj.lowbit_adapters.zeros"))
    for wrong, said in (
        (state[key].int(), "got torch.int32"),
        (state[key][:3], "needs int16"),
        (torch.full_like(state[key], -1), "bits behind the 32 weights of a row"),
    ):
        with pytest.raises(ValueError, match=said):
            load_adapter_state(llama("full_qat", by=None), state | {key: wrong})
    with pytest.raises(ValueError, match="unknown: .*zeros"):
        load_adapter_state(adapted_llama(adapter_config("scale"), GRID), {key: state[key]})


def test_a_run_with_the_zeros_of_its_base_resumes_bit_equal(tmp_path: Path) -> None:
    """quant.sparsity without a schedule: the mask is the base's, and no part of a checkpoint."""

    def masked(seed: int) -> Any:
        model = llama("lr_qat", seed, by=None)
        for _, layer in adapted_layers(model):
            zeros = torch.rand(layer.base.shape, generator=torch.Generator().manual_seed(3)) < 0.5
            codes = layer.base.unpack_codes().masked_fill(zeros, GRID.levels // 2)
            packed = kernels.pack(codes, GRID.bits)
            base = PackedWeight(**{**vars(layer.base), "codes": packed}).masked(zeros)
            layer._names, layer.grid = tuple(base.to_tensors()), base.grid
            layer.register_buffer("mask", base.mask)
            layer.fill(base)
        return model

    straight = run(tmp_path / "a", masked(1))
    run(tmp_path / "b", masked(1), 1)
    again = run(tmp_path / "b", masked(2), resume=True)
    one, two = adapter_state(straight), adapter_state(again)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and not zeros_of(again)
    moved = 0
    for _, layer in adapted_layers(again):
        end = layer.adapter.merge(layer.base)
        assert not end.dequantize()[layer.base.locked].any()
        moved += int((end.unpack_codes() != layer.base.unpack_codes()).sum())
    assert moved > 0


GROWING = {"kind": "magnitude", "schedule": {"every": 5}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {  # what stands against it, and what is said
    "scale": ({"adapter": adapter_config("scale")}, "scale leaves codes as the base has them.*use full_qat"),
    "ef_qat": ({"adapter": adapter_config("ef_qat")}, "ef_qat leaves codes as the base has them"),
    "lora": ({"adapter": adapter_config("lora")}, "lora adds its update beside the base"),
    "targets": (
        {"adapter": adapter_config("full_qat", targets=["*.q_proj"])},
        "adapter.targets leaves layers without an adapter",
    ),
    "no steps": ({"max_steps": 0}, "train.max_steps is 0, so nothing prunes"),
    "fsdp": ({"sharding": "fsdp"}, "no process holds a whole matrix"),
    "wanda": ({"kind": "wanda"}, "kind: wanda, which looks at the model once; set kind: magnitude"),
    "none": ({"kind": "none"}, "kind: none, which looks at the model once"),
    "2:4": ({"pattern": "2:4"}, "2:4 is 0.5 of the weights from the start"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pruned_while_it_trains_is_refused_by_name(case: str) -> None:
    changes, said = REFUSED[case]
    of_train = {"max_steps": 9, "sharding": "none"}
    train = {key: changes.get(key, value) for key, value in of_train.items()}
    sparsity = GROWING | {k: v for k, v in changes.items() if k in ("kind", "pattern")}
    quant = QuantSection.model_validate({"sparsity": sparsity, "calibrate": "mse"})
    adapter = changes.get("adapter", adapter_config("full_qat"))
    sections = SimpleNamespace(quant=quant, adapter=adapter, train=SimpleNamespace(**train))
    problems = [*check_sparsity(sections), *check_schedule(sections)]
    assert len(problems) == 1 and re.search(said, str(problems[0]))


def test_the_recipe_says_it_and_packing_does_not_prune() -> None:
    recipe = load_recipe("recipes/quickstart.yaml", ["quant.sparsity={kind: magnitude, schedule: {}}"])
    assert recipe.quant.sparsity.gradual(100) == Gradual("magnitude", 0.5, "unstructured", 0, 50, 10)
    assert not recipe.quant.locks and recipe.quant.grid_for("model.layers.0.x") == IntGrid(bits=4)
    with pytest.raises(RecipeError, match="start 0.7 is behind end 0.5"):
        load_recipe(
            "recipes/quickstart.yaml",
            ["quant.sparsity={kind: magnitude, schedule: {start: 0.7}}"],
        )
    with pytest.raises(RecipeError, match="adapter.targets leaves layers without an adapter"):
        load_recipe(
            "recipes/quickstart.yaml",
            ["quant.sparsity={kind: magnitude, schedule: {}}", "adapter.targets=['*.q_proj']"],
        )
    with pytest.raises(ValueError, match="schedule: zeros that come while a recipe's run trains"):
        Direct.of({"sparsity": GROWING, "calibrate": "mse"})


def test_plan_counts_the_bits_and_the_choice_of_zeros() -> None:
    keys = ["quant.sparsity={kind: magnitude, schedule: {}}"]
    with_zeros, without = (load_recipe("recipes/quickstart.yaml", more) for more in (keys, []))
    grown, plain = (skeleton(recipe, TINY) for recipe in (with_zeros, without))
    bits = sum(
        2 * row.out_features * kernels.packed_width(row.in_features, 1)
        for row in grown.rows
        if row.reason is None
    )
    assert grown.held["adapters"] - plain.held["adapters"] == bits > 0 and grown.held["mask"] == 0
    assert grown.trainable == plain.trainable
    assert choice_moments(with_zeros, grown.largest)[0][0] == PRUNE_BYTES * 768 * 256
    assert choice_moments(without, plain.largest) == []
