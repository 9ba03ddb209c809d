"""Two processes share one packed base: same losses, same trained bytes, half the memory, checkpoints for any
number of processes.

One torchrun of this file does everything that needs two processes (`together`); the tests compare what it
left with what one process does here. Two gradients add up to the same number in either order, so the
comparisons are exact.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Shard

from lowbit_ft import pipeline
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, base_digest
from lowbit_ft.data.batches import Batches
from lowbit_ft.grid import BinaryGrid, Grid, IntGrid
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.shards import is_sharded, part_like, whole
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.train import losses
from lowbit_ft.train import setup as train_setup
from lowbit_ft.train.loop import TrainError, TrainResult, make_accelerator, train
from lowbit_ft.train.sharding import held, held_by_rank, shard, unshardable
from tests.packed_tools import random_weight, random_weights
from tests.toy import examples, quiet, section

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
WIDE = IntGrid(bits=3, group_size=64, symmetric=False, residual_bits=4)
# every method, on a grid with other tensors: zero points or none, residual or none, one group per row, planes
GRIDS: dict[str, Grid] = {
    "lr_qat": WIDE,
    "dl_qat": IntGrid(bits=4, group_size=-1, residual_bits=2),
    "l4q": IntGrid(bits=2, group_size=32, symmetric=False, residual_bits=4),
    "scale": IntGrid(bits=8, group_size=128, residual_bits=0),
    "alpha_tuning": BinaryGrid(bits=3, group_size=64),
    "lora": IntGrid(bits=4, group_size=64, residual_bits=0),
}
STEPS = 4


def packed(method: str = "lr_qat", start: int = 0, bias: bool = False, head: bool = False) -> Any:
    """A Llama of two layers with random integers on the method's grid; start seeds A. head: its head is
    packed and trained too.
    """
    # 32: halves of the head's tensors fill whole vectors, of which AdamW rounds the rest otherwise
    config = transformers.LlamaConfig(
        vocab_size=32 if head else 23,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=bias,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for name, weight in random_weights(model, GRIDS[method]).items():
        model.set_submodule(name, PackedLinear(weight, model.get_submodule(name).bias))
    if head:
        model.set_submodule("lm_head", PackedLinear(random_weight((32, 128), GRIDS[method])))
    torch.manual_seed(1 + start)
    attach(model, ADAPTERS[method](**({"rank": 3} if "rank" in ADAPTERS[method].model_fields else {})))
    return model


def stop_at(step: int) -> Any:
    return lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == step else None


def go(
    run_dir: Path,
    model: Any,
    rank: int = 0,
    world: int = 1,
    *,
    resume: bool = False,
    on_step: Any = None,
    **changes: Any,
) -> TrainResult:
    """Two windows per step in all. Three windows of validation: two processes have unequal shares."""
    data = Batches(examples(11), 1, 0, 0, rank, world)
    valid = Batches(examples(3, seed=1), 1, 0, 0, rank, world)
    setting = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2 // world,
        "max_grad_norm": 0.1,
        "eval_every": 2,
        "warmup_ratio": 0.0,
    }
    return train(
        model,
        data,
        valid,
        section(**(setting | changes)),
        run_dir,
        resume=resume,
        on_step=on_step,
        console=quiet(),
    )


LONG = {"gradient_checkpointing": True, "offload": "cpu", "mlp_chunk": 16}


def chunked(run_dir: Path, model: Any, *place: int, **changes: Any) -> TrainResult:
    """`go` with the loss in chunks of 5 targets, which so small a vocabulary has not by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "LOGITS_AT_A_TIME", model.config.vocab_size * 5)
        patch.setattr(losses, "_SMALL_VOCABULARY", 0)
        seen: list[int] = []
        hook = model.lm_head.register_forward_hook(
            lambda _m, _a, out: seen.append(out.shape[-2]) if model.training else None
        )
        result = go(run_dir, model, *place, **changes)
        hook.remove()
    assert max(seen) == 5 and len(seen) > 2 * STEPS, seen
    return result


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


# ---------------------------------------------------------------- what the two processes run


def together(folder: Path) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)
    rank, facts = int(os.environ["RANK"]), {}

    def sharded(method: str = "lr_qat", start: int = 0, **options: Any) -> Any:
        model = packed(method, start if rank == 0 else 5, **options)  # what rank 0 starts with counts
        shard(model, CPU)
        return model

    go(folder / "ddp", packed(), rank, 2)
    facts["ddp"] = held_by_rank(packed(), CPU)
    for method in GRIDS:
        model = sharded(method, bias=method == "dl_qat")
        facts[method] = held_by_rank(model, CPU)
        go(folder / method, model, rank, 2)
    # between steps every packed tensor is a shard again, its integers untouched
    layer = next(m for m in model.modules() if isinstance(m, PackedLinear))
    tensors = layer.base.to_tensors()
    assert all(isinstance(t, DTensor) and isinstance(t.placements[0], Shard) for t in tensors.values())
    name = next(n for n, m in model.named_modules() if m is layer)
    fresh = packed(method).get_submodule(name).base.to_tensors()
    # as fp32, which is exact: gloo cannot gather int16 by itself (fully_shard gathers bytes)
    assert (
        all(torch.equal(whole(t.float()), fresh[n].float()) for n, t in tensors.items())
        and tensors["codes"].dtype == torch.int16
    )
    for n, t in tensors.items():
        assert torch.equal(part_like(fresh[n], t).to_local(), t.to_local())
    go(folder / "recomputed", sharded(), rank, 2, gradient_checkpointing=True)
    go(folder / "bf16", sharded(), rank, 2, mixed_precision="bf16")
    chunked(folder / "chunks", sharded(), rank, 2, **LONG)
    chunked(folder / "chunks-disk", sharded(), rank, 2, **LONG | {"offload": "disk"})
    chunked(folder / "chunks-head", sharded(head=True), rank, 2)
    chunked(folder / "chunks-ddp", packed(head=True), rank, 2)
    chunked(folder / "chunks-ddp-long", packed(), rank, 2, **LONG)
    go(folder / "kept", packed(), rank, 2, keep_codes=True)
    if shutil.which("g++"):
        go(folder / "compiled", sharded(), rank, 2, compile=True, gradient_checkpointing=True)
    go(folder / "best", sharded(), rank, 2, keep_best=True, eval_every=1, learning_rate=0.5)
    # a signal to one of them stops both; one process goes on (in the test), and the other way round
    result = go(folder / "two-then-one", sharded(), rank, 2, on_step=stop_at(1) if rank == 1 else None)
    facts["stopped"] = [result.stopped, result.steps]
    go(folder / "one-then-two", sharded(start=9), rank, 2, resume=True)
    go(folder / "one-then-ddp", packed(start=9), rank, 2, resume=True)
    for name, model, changes in (
        ("refused", sharded(), {"optimizer": "adamw8bit"}),
        ("whole", packed(), {"sharding": "fsdp"}),
    ):
        try:
            go(folder / name, model, rank, 2, **changes)
        except TrainError as error:
            facts[name] = str(error)
    if rank == 0:
        (folder / "facts.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after both: the runs of two processes, and "one" of a single one."""
    folder = tmp_path_factory.mktemp("together")
    for name in ("one-then-two", "one-then-ddp"):
        assert go(folder / name, packed(), on_step=stop_at(1)).stopped
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
        str(folder),
    ]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-4000:]
    go(folder / "one", packed())
    return folder


# ---------------------------------------------------------------- the tests


def test_ddp_is_one_process(done: Path) -> None:
    assert_same(done / "ddp", done / "one")


@pytest.mark.parametrize("method", GRIDS)
def test_every_method_sharded_is_one_process(method: str, done: Path, tmp_path: Path) -> None:
    assert set(GRIDS) == set(ADAPTERS)
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
    if shutil.which("g++") is None:
        pytest.skip("TorchInductor needs a C++ compiler on the CPU")
    go(tmp_path, packed(), compile=True)
    assert_same(done / "compiled", tmp_path)


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
        "train.sharding: got 'fsdp', but the model is whole; call lowbit_ft.sharding.shard"
    )


@pytest.mark.parametrize(("used", "count"), [("FSDP", 1), ("DEEPSPEED", 1), ("MULTI_CPU", 2)])
def test_accelerate_must_have_set_up_what_was_launched(
    used: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(distributed_type=DistributedType(used), num_processes=count)
    monkeypatch.setattr(train_setup, "Accelerator", lambda **_: fake)
    with pytest.raises(
        TrainError, match=f"accelerate has set up {used} with {count} processes, and 1 were launched"
    ):
        make_accelerator(section(), tmp_path, packed())


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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("machines", [1, 2])
def test_the_line_by_accelerate_launch_ships_what_one_process_ships(
    machines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented configurations, their numbers given on the command line; the merged bytes are the same.
    Two machines are two launches that meet at a port."""
    monkeypatch.chdir(ROOT)
    common = [
        "train.max_steps=2",
        "train.micro_batch_size=1",
        "train.eval_every=null",
        "train.save_every=null",
        "data.train.limit=60",
        "data.valid.limit=3",
        "data.sequence_len=64",
        "quant.bits=3",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    config = ROOT / "docs" / "accelerate" / ("one-machine.yaml" if machines == 1 else "two-machines.yaml")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--num_processes",
        "2",
    ]
    line = [
        "-m",
        "lowbit_ft",
        "train",
        "recipes/quickstart.yaml",
        *common,
        "train.gradient_accumulation_steps=1",
        "train.sharding=fsdp",
    ]
    place = (
        [] if machines == 1 else ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    )
    errors = [(tmp_path / f"stderr-{rank}").open("w+") for rank in range(machines)]
    launched = [
        subprocess.Popen(
            [*command, *place, "--machine_rank", str(rank), *line, f"output={two}"],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
        for rank, file in enumerate(errors)
    ]
    try:
        codes = [process.wait(timeout=600) for process in launched]
    finally:
        for process in launched:
            process.kill()
        said = "".join(Path(file.name).read_text()[-4000:] for file in errors)
        for file in errors:
            file.close()
    assert codes == [0] * machines, said
    pipeline.train(
        load_recipe(
            "recipes/quickstart.yaml", [*common, "train.gradient_accumulation_steps=2", f"output={one}"]
        )
    )
    for path in ("merged/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (one / path).read_bytes() == (two / path).read_bytes(), path
    held_by = json.loads((two / "processes.json").read_text())
    assert held_by["type"] == "FSDP2" and len(held_by["ranks"]) == 2 and not (one / "processes.json").exists()
    assert all(row["base"] <= 0.55 * row["whole_base"] for row in held_by["ranks"])


if __name__ == "__main__":
    together(Path(sys.argv[1]))
