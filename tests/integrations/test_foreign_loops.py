"""Other people's training loops over our layers: Trainer and plain accelerate in two processes, kbit
preparation, l4q's warm-up."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, base_digest
from lowbit_ft.adapters.uncounted import say_uncounted
from lowbit_ft.export.writer import write_model
from lowbit_ft.integrations.callbacks import StepCallback, begin_step
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.integrations.peft_layer import LowBitLinear
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.linear import PackedLinear
from tests.forks import run_together
from tests.integrations.loading import NATIVE
from tests.integrations.peft_models import logits, packed_model, tokens, train
from tests.packed_tools import IDS, int_grid, random_weights, tiny_checkpoint

IN_TWO_PROCESSES = """
import json, sys, torch
import lowbit_ft
from accelerate import Accelerator
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, base_digest
from lowbit_ft.integrations.peft import LowBitConfig

base, out, *kinds = sys.argv[1:]


def run(kind):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if kind == "attached":
        attach(model, ADAPTERS["lr_qat"](method="lr_qat", rank=4))
    else:
        torch.manual_seed(0)
        model = get_peft_model(model, LowBitConfig(rank=4, task_type="CAUSAL_LM"))
    texts = [torch.arange(3 + i, 19 + i) for i in range(8)]
    rows = [{"input_ids": text, "labels": text} for text in texts]
    if kind == "trainer":
        arguments = TrainingArguments(out + "/trainer", max_steps=3, per_device_train_batch_size=1,
                                      learning_rate=0.01, use_cpu=True, report_to=[], logging_steps=1,
                                      save_strategy="no", seed=0)
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        wrapped = type(trainer.model_wrapped).__name__
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    else:
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        whole = model
        model, optimizer = accelerator.prepare(model, optimizer)
        wrapped, losses = type(model).__name__, []
        for step in range(3):
            row = rows[2 * step + accelerator.process_index]
            loss = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model = whole
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moved = [name for name, p in trained.items() if name.endswith(".B") and p.any()]
    rank = torch.distributed.get_rank()
    sums = [float(p.double().sum()) for p in trained.values()]
    facts = {"wrapped": wrapped, "losses": losses, "moved": len(moved), "sums": sums}
    facts["base"] = base_digest(model)
    with open(f"{out}/{kind}-{rank}.json", "w") as file:
        json.dump(facts, file)


for kind in kinds:
    run(kind)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    checkpoint = Checkpoint.open(tiny_checkpoint(folder / "dense"))
    grid = int_grid(bits=3, residual_bits=4)
    write_model(folder / "packed", checkpoint, random_weights(checkpoint.empty_model(), grid), NATIVE)
    return folder / "packed"


def test_ddp_of_other_loops(base: Path, tmp_path: Path) -> None:
    """No loop knows of packed buffers. Both processes end with the same adapters, over the same base."""
    (tmp_path / "loop.py").write_text(IN_TWO_PROCESSES)
    kinds = ("attached", "accelerate", "trainer")
    done = run_together(tmp_path / "loop.py", base, tmp_path, *kinds)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in kinds:
        first, second = (json.loads((tmp_path / f"{kind}-{rank}.json").read_text()) for rank in (0, 1))
        assert first["wrapped"] == second["wrapped"] == "DistributedDataParallel", kind
        assert first["sums"] == second["sums"] and first["moved"] == 7 and len(first["losses"]) == 3, kind
        if kind != "trainer":  # whose log is the mean over the processes
            assert first["losses"] != second["losses"], kind
        assert first["base"] == second["base"], kind


def kbit(model: Any) -> dict[str, Any]:
    """What prepare_model_for_kbit_training has made of a model, but for what is packed."""
    packed = tuple(
        n for n, m in model.named_modules() if isinstance(m, PackedLinear) or type(m).__name__ == "Linear4bit"
    )
    return {
        "dense": {
            name: (str(p.dtype), p.requires_grad)
            for name, p in model.named_parameters()
            if not name.startswith(packed)
        },
        "checkpointing": [
            m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")
        ],
        "inputs": model.get_input_embeddings()(IDS).requires_grad,
    }


@pytest.mark.parametrize("on", [True, False])
def test_kbit_preparation_is_that_of_4_bit_bitsandbytes(on: bool, base: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    digest, dtypes = base_digest(ours), {n: b.dtype for n, b in ours.named_buffers()}
    theirs = AutoModelForCausalLM.from_pretrained(
        base.parent / "dense",
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        device_map="cpu",
    )
    assert sum(type(m).__name__ == "Linear4bit" for m in theirs.modules()) == 7
    for model in (ours, theirs):
        assert prepare_model_for_kbit_training(model, use_gradient_checkpointing=on) is model
    assert kbit(ours) == kbit(theirs)
    assert any(kbit(ours)["checkpointing"]) == on == kbit(ours)["inputs"]
    assert base_digest(ours) == digest and {n: b.dtype for n, b in ours.named_buffers()} == dtypes
    assert not hasattr(ours, "is_loaded_in_4bit")  # TRL would cast the adapters' masters
    model = get_peft_model(ours, LowBitConfig(rank=4))
    ids = tokens(rows=2) % 60
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class Rows(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": tokens(rows=1, seed=i)[0], "labels": tokens(rows=1, seed=i)[0]}


def trainer_of(model: Any, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        seed=0,
    )
    return Trainer(model, arguments, train_dataset=Rows(), **options)


def test_a_warm_up_that_nobody_counts_is_said_once(tmp_path: Path) -> None:
    say_uncounted.cache_clear()
    model = get_peft_model(packed_model(), LowBitConfig("l4q", rank=4, warmup_steps=2))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        logits(model)  # looked at, not trained
        assert not [w for w in said if "warmup_steps" in str(w.message)]
        model.train()
        trainer_of(model, tmp_path).train()
        other = packed_model()
        attach(other, ADAPTERS["l4q"](method="l4q", rank=4, warmup_steps=2))
        other.train()
        other(input_ids=tokens(), labels=tokens()).loss.backward()
    texts = [str(w.message) for w in said if "warmup_steps" in str(w.message)]
    assert len(texts) == 1 and "StepCallback()" in texts[0]


def test_the_callback_counts_the_warm_up(tmp_path: Path) -> None:
    """Through Trainer: plain LoRA before the switch, the scale restarted at it; as a loop by hand does it."""
    say_uncounted.cache_clear()
    seen: list[tuple[bool, float]] = []

    class Look(StepCallback):
        def on_step_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            super().on_step_begin(args, state, control, model=model, **kwargs)
            adapter = next(m for m in model.modules() if isinstance(m, LowBitLinear)).lowbit_adapters[
                "default"
            ]
            seen.append((adapter.warming, float(adapter.log_scale.abs().sum())))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="l4q: warmup_steps")
        model = get_peft_model(packed_model(), LowBitConfig("l4q", rank=4, warmup_steps=2))
        trainer_of(model, tmp_path, callbacks=[Look()]).train()
    assert [warming for warming, _ in seen] == [True, True, False, False, False]
    assert seen[0][1] == seen[1][1] == 0 and seen[2][1] > 0
    expected = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), expected)


def test_begin_step_of_any_model() -> None:
    model = packed_model()
    with pytest.raises(ValueError, match="no adapters of lowbit_ft"):
        begin_step(model, 0)
    attach(model, ADAPTERS["l4q"](method="l4q", rank=4, warmup_steps=1))
    begin_step(torch.nn.Sequential(model), 0)
    layer = next(m for m in model.modules() if isinstance(m, PackedLinear))
    assert layer.adapter is not None and layer.adapter.warming  # pyright: ignore[reportAttributeAccessIssue]
    train(model, steps=1)
    begin_step(torch.nn.Sequential(model), 1)
    assert not layer.adapter.warming  # pyright: ignore[reportAttributeAccessIssue]
