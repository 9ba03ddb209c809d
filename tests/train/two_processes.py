"""What two processes run together, as torchrun launches this file, and the same run in one process."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from lowbit_ft.adapters.attach import begin_step
from lowbit_ft.data.batches import Batches
from lowbit_ft.grid import BinaryGrid, Grid, IntGrid
from lowbit_ft.model import heads
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.shards import part_like, whole
from lowbit_ft.train import prepare
from lowbit_ft.train.loop import TrainResult, train
from lowbit_ft.train.setup import TrainError
from lowbit_ft.train.sharding import held_by_rank, shard
from tests.activations.common import learning
from tests.packed_tools import adapted_llama, adapter_config
from tests.toy import examples, quiet, section

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
WIDE = IntGrid(bits=3, group_size=64, symmetric=False, residual_bits=4)
# every method, on a grid with other tensors: zero points or none, residual or none, one group per row, planes
GRIDS: dict[str, Grid] = {
    "lr_qat": WIDE,
    "dl_qat": IntGrid(bits=4, group_size=-1, residual_bits=2),
    "l4q": IntGrid(bits=2, group_size=32, symmetric=False, residual_bits=4),
    # lota is refused there: its optimizer looks at whole tensors
    "scale": IntGrid(bits=8, group_size=128, residual_bits=0),
    "full_qat": IntGrid(bits=3, group_size=64),
    "ef_qat": IntGrid(bits=2, group_size=-1),
    "alpha_tuning": BinaryGrid(bits=3, group_size=64),
    "lora": IntGrid(bits=4, group_size=64, residual_bits=0),
}
STEPS = 4


def packed(
    method: str = "lr_qat", start: int = 0, bias: bool = False, head: bool = False, **options: Any
) -> Any:
    """Random integers on the method's grid; start seeds A. head: its head is packed and trained too."""
    return adapted_llama(
        adapter_config(method, rank=3, **options),
        GRIDS.get(method, WIDE),
        seed=1 + start,
        head=head,
        # 32: halves of the head's tensors fill whole vectors, of which AdamW rounds the rest otherwise
        vocab_size=32 if head else 23,
        hidden_size=128,
        intermediate_size=192,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=bias,
    )


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
    length: int | None = None,
    **changes: Any,
) -> TrainResult:
    """Two windows per step in all. Three windows of validation: two processes have unequal shares."""
    data = Batches(examples(11, length=length), 1, 0, 0, rank, world)
    valid = Batches(examples(3, seed=1, length=length), 1, 0, 0, rank, world)
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


# a gradient that is not backprop's, under DDP
WAYS: dict[str, dict[str, Any]] = {
    "zeroth_order": {"kind": "zeroth_order", "momentum": 0.5},
    "fogzo": {"kind": "fogzo", "start": 0.5, "kappa_end": 2.0, "cage": {"silence": 0.5, "lambda": 0.9}},
}
TERNARY: dict[str, Any] = {"optimizer": "t_signsgd", "learning_rate": 0.3}
LONG = {"gradient_checkpointing": True, "offload": "cpu", "mlp_chunk": 16}


def chunked(run_dir: Path, model: Any, *place: int, **changes: Any) -> TrainResult:
    """`go` with the loss in chunks of 5 targets, which so small a vocabulary has not by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "LOGITS_AT_A_TIME", model.config.vocab_size * 5)
        patch.setattr(heads, "SMALL_VOCABULARY", 0)
        seen: list[int] = []
        hook = model.lm_head.register_forward_hook(
            lambda _m, _a, out: seen.append(out.shape[-2]) if model.training else None
        )
        result = go(run_dir, model, *place, **changes)
        hook.remove()
    assert max(seen) == 5 and len(seen) > 2 * STEPS, seen
    return result


def compiled(run_dir: Path, model: Any, *place: int) -> TrainResult:
    """`go` with compiled layers. Which graphs there are and what they save is the same for every backend;
    this one needs no C++ compiler, and one length of window is one graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "compile_layers", partial(prepare.compile_layers, backend="aot_eager"))
        return go(run_dir, model, *place, length=9, compile=True, gradient_checkpointing=True)


def rows_change(run_dir: Path, *place: int) -> Any:
    """ef_qat under DDP, its rows chosen by what step 0 of all processes saw, and anew after two steps;
    stopped in step 0, whose checkpoint holds what was seen, and gone on with."""
    for stop in (True, False):
        model = packed("ef_qat", importance="weight_input", refresh_steps=2)

        def on_step(step: int, model: Any = model, stop: bool = stop) -> Any:
            if stop:
                stop_at(0)(step)
            return begin_step(model, step)

        go(run_dir, model, *place, on_step=on_step, resume=not stop, keep_checkpoints=9)
    return model


def together(folder: Path) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)
    rank, facts = int(os.environ["RANK"]), {}

    def sharded(method: str = "lr_qat", start: int = 0, **options: Any) -> Any:
        model = packed(method, start if rank == 0 else 5, **options)  # what rank 0 starts with counts
        shard(model, CPU)
        return model

    go(folder / "ddp", packed(), rank, 2)
    rows_change(folder / "rows", rank, 2)
    go(folder / "masters", packed("full_qat", master="bf16"), rank, 2)
    go(folder / "ternary", packed("lota"), rank, 2, **TERNARY)
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
    go(folder / "inputs-ddp", learning(packed()), rank, 2)
    inputs = learning(packed(), seed=1 if rank == 0 else 5)
    shard(inputs, CPU)
    go(folder / "inputs", inputs, rank, 2)
    go(folder / "bf16", sharded(), rank, 2, mixed_precision="bf16")
    chunked(folder / "chunks", sharded(), rank, 2, **LONG)
    chunked(folder / "chunks-disk", sharded(), rank, 2, **LONG | {"offload": "disk"})
    chunked(folder / "chunks-head", sharded(head=True), rank, 2)
    chunked(folder / "chunks-ddp", packed(head=True), rank, 2)
    chunked(folder / "chunks-ddp-long", packed(), rank, 2, **LONG)
    go(folder / "kept", packed(), rank, 2, keep_codes=True)
    for way, gradient in WAYS.items():
        go(folder / way, packed(), rank, 2, gradient=gradient, max_grad_norm=1.0)
    compiled(folder / "compiled", sharded(), rank, 2)
    go(folder / "best", sharded(), rank, 2, keep_best=True, eval_every=1, learning_rate=0.5)
    # a signal to one of them stops both; one process goes on (in the test), and the other way round
    result = go(folder / "two-then-one", sharded(), rank, 2, on_step=stop_at(1) if rank == 1 else None)
    facts["stopped"] = [result.stopped, result.steps]
    go(folder / "one-then-two", sharded(start=9), rank, 2, resume=True)
    go(folder / "one-then-ddp", packed(start=9), rank, 2, resume=True)
    for name, model, changes in (
        ("refused", sharded(), {"optimizer": "adamw8bit"}),
        ("whole", packed(), {"sharding": "fsdp"}),
        ("estimate", sharded(), {"gradient": {"kind": "fogzo"}}),
    ):
        try:
            go(folder / name, model, rank, 2, **changes)
        except TrainError as error:
            facts[name] = str(error)
    if rank == 0:
        (folder / "facts.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    together(Path(sys.argv[1]))
