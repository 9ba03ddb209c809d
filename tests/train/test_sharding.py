"""Two processes share one packed base: same losses, same trained bytes, half the memory, checkpoints for any
number of processes.

One run of two_processes.py does everything that needs two processes; the tests compare what it left with
what one process does here. Two gradients add up to the same number in either order, so the comparisons are
exact.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapted_layers, base_digest
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.shards import is_sharded
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.train.setup import TrainError
from lowbit_ft.train.sharding import held, unshardable
from tests.activations.common import learning
from tests.forks import run_together
from tests.train import two_processes
from tests.train.two_processes import GRIDS, LONG, ROOT, STEPS, WAYS, chunked, go, packed, stop_at


def rows(run_dir: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def last(run_dir: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Trained tensors and the optimizer's, without the generators' states, of which there is one per
    process.
    """
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    tensors = load_file(folder / "adapter.safetensors") | load_file(folder / "optimizer.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("rng/")}


def assert_same(found: Path, wanted: Path) -> None:
    a, b = last(found), last(wanted)
    assert a.keys() == b.keys() and len(a) > 20
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert rows(found, "loss") == rows(wanted, "loss") and len(rows(wanted, "loss")) == STEPS
    assert rows(found, "valid_loss") == pytest.approx(rows(wanted, "valid_loss"), rel=1e-12)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after both: the runs of two processes, and "one" of a single one."""
    folder = tmp_path_factory.mktemp("together")
    for name in ("one-then-two", "one-then-ddp"):
        assert go(folder / name, packed(), on_step=stop_at(1)).stopped
    ran = run_together(two_processes.__file__, folder)
    assert ran.returncode == 0, ran.stderr[-4000:]
    go(folder / "one", packed())
    return folder


def test_ddp_is_one_process(done: Path) -> None:
    assert_same(done / "ddp", done / "one")


def test_ternary_numbers_are_the_same_in_every_process(done: Path, tmp_path: Path) -> None:
    go(tmp_path, packed("lota"), **two_processes.TERNARY)
    a, b = last(done / "ternary"), last(tmp_path)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert all(bool(((t == 0) | (t.abs() == 1)).all()) for t in a.values())
    assert any(t.any() for name, t in a.items() if name.endswith(".B"))


def test_rows_that_change_are_the_same_in_every_process(done: Path, tmp_path: Path) -> None:
    model = two_processes.rows_change(tmp_path)
    assert any(len(layer.adapter.left) for _, layer in adapted_layers(model))  # pyright: ignore
    assert_same(done / "rows", tmp_path)


def test_a_d_in_bf16_is_rounded_alike_in_every_process(done: Path, tmp_path: Path) -> None:
    go(tmp_path, packed("full_qat", master="bf16"))
    assert_same(done / "masters", tmp_path)


@pytest.mark.parametrize("method", GRIDS)
def test_every_method_sharded_is_one_process(method: str, done: Path, tmp_path: Path) -> None:
    assert set(GRIDS) == {name for name, config in ADAPTERS.items() if not config.ternary}
    go(tmp_path, packed(method, bias=method == "dl_qat"))
    assert_same(done / method, tmp_path)


@pytest.mark.parametrize("method", GRIDS)
def test_each_process_holds_its_half(method: str, done: Path) -> None:
    facts = json.loads((done / "facts.json").read_text())
    one = held(packed(method, bias=method == "dl_qat"))
    for row in facts[method]:
        assert row["whole_base"] == one.whole_base == one.base
        assert row["base"] <= 0.55 * one.base and row["rest"] <= 0.55 * one.rest
    assert sum(row["base"] for row in facts[method]) == one.base
    assert [row["base"] for row in facts["ddp"]] == [held(packed()).base] * 2


def test_recomputing_and_bf16_are_what_they_are_in_one_process(done: Path, tmp_path: Path) -> None:
    assert_same(done / "recomputed", done / "one")
    go(tmp_path, packed(), mixed_precision="bf16")
    assert_same(done / "bf16", tmp_path)
    assert rows(tmp_path, "loss") != rows(done / "one", "loss")


def test_input_scales_that_learn_are_what_they_are_in_one_process(done: Path, tmp_path: Path) -> None:
    go(tmp_path, learning(packed()))
    assert sum(name.endswith(".log_input_scale") for name in last(tmp_path)) == 8
    assert_same(done / "inputs", tmp_path)
    assert_same(done / "inputs-ddp", tmp_path)


def test_a_loss_in_chunks_is_what_it_is_in_one_process(done: Path, tmp_path: Path) -> None:
    """Under FSDP the recomputation of a chunk finds the gathered head, trained or not; under DDP a gradient
    is handed on once.
    """
    chunked(tmp_path / "one", packed(), **LONG)
    for name in ("chunks", "chunks-disk", "chunks-ddp-long"):
        assert_same(done / name, tmp_path / "one")
    chunked(tmp_path / "head", packed(head=True))
    for name in ("chunks-head", "chunks-ddp"):
        assert_same(done / name, tmp_path / "head")
    assert "lm_head.adapter.A" in last(tmp_path / "head") and rows(tmp_path / "one", "loss") == pytest.approx(
        rows(done / "one", "loss"), rel=1e-4
    )


def test_resume_with_another_number_of_processes(done: Path) -> None:
    assert json.loads((done / "facts.json").read_text())["stopped"] == [True, 2]
    assert go(done / "two-then-one", packed(start=9), resume=True).steps == STEPS
    for name in ("two-then-one", "one-then-two", "one-then-ddp"):
        assert_same(done / name, done / "one")


def test_kept_codes_under_ddp_and_compiled_layers_under_fsdp(done: Path, tmp_path: Path) -> None:
    assert_same(done / "kept", done / "one")
    two_processes.compiled(tmp_path, packed())
    assert_same(done / "compiled", tmp_path)


def test_estimates_and_a_pull_under_ddp(done: Path, tmp_path: Path) -> None:
    """Two processes exchange losses and make the same directions, which one process makes, too."""
    for way, gradient in WAYS.items():
        go(tmp_path / way, packed(), gradient=gradient, max_grad_norm=1.0)
        assert_same(done / way, tmp_path / way)
    facts = json.loads((done / "facts.json").read_text())
    assert facts["estimate"].startswith("train.gradient: got 'fogzo', which moves whole tensors")


def test_the_best_step_is_kept(done: Path, tmp_path: Path) -> None:
    go(tmp_path, packed(), keep_best=True, eval_every=1, learning_rate=0.5)
    assert_same(done / "best", tmp_path)


def test_another_number_of_windows_per_step_is_refused(tmp_path: Path) -> None:
    go(tmp_path, packed(), max_steps=1, eval_every=None)
    with pytest.raises(TrainError, match="windows per step was 2 and is 3"):
        go(tmp_path, packed(), max_steps=2, resume=True, gradient_accumulation_steps=3)


def test_what_cannot_be_sharded_is_refused_with_the_way_out(done: Path) -> None:
    quick = str(ROOT / "recipes" / "quickstart.yaml")
    load_recipe(quick, ["train.sharding=fsdp"])
    changes = [
        "train.sharding=fsdp",
        "train.optimizer=adamw8bit",
        "adapter={method: l4q, rank: 4, warmup_steps: 2}",
    ]
    with pytest.raises(RecipeError) as raised:
        load_recipe(quick, changes)
    assert "cannot step on shards; set optimizer: adamw" in str(
        raised.value
    ) and "set warmup_steps: 0" in str(raised.value)
    load_recipe(quick, [*changes, "train.sharding=none"])
    assert [key for key, _ in unshardable(SimpleNamespace(optimizer="adamw", mixed_precision="fp16"))] == [
        ("train", "mixed_precision")
    ]
    kept = SimpleNamespace(optimizer="adamw", mixed_precision="no", keep_codes=True)
    assert [key for key, _ in unshardable(kept)] == [("train", "keep_codes")]
    facts = json.loads((done / "facts.json").read_text())
    assert facts["refused"].startswith(
        "train.optimizer: got 'adamw8bit' (bitsandbytes) cannot step on shards"
    )
    assert facts["whole"].startswith(
        "train.sharding: got 'fsdp', but the model is whole; call lowbit_ft.train.sharding.shard"
    )


def test_frozen_parameters_change_nothing_but_their_kind() -> None:
    model, plain = packed(bias=True), packed(bias=True)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.freeze_into_parameters()
    assert list(model.state_dict()) != [] and set(model.state_dict()) == set(plain.state_dict())
    assert not is_sharded(model) and held(model) == held(plain) and base_digest(model) == base_digest(plain)
    ids = torch.arange(7)[None]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    model.to(torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    few = torch.ones(
        1, 128, dtype=torch.bfloat16
    )  # one row in eval mode, where a whole layer would be repacked for decoding
    layer.adapter, adapter = None, layer.adapter
    with torch.no_grad():
        assert torch.equal(layer.eval()(few), layer.base.linear(few) + layer.bias)
    layer.adapter = adapter
    assert (
        layer.codes.dtype == torch.int16
        and layer.adapter.A.dtype == torch.float32
        and layer.bias.dtype == torch.bfloat16
    )
