"""DPO and ORPO of a recipe beside trl's trainers: the same packed base, adapters, rows and order, losses by
step.

    pip install trl
    python benchmarks/preference_trl.py --steps 8 --out benchmarks/results/preference_trl.json

Ours is train.signal of a recipe, with our loop; theirs is trl.DPOTrainer (trl.experimental.orpo.ORPOTrainer)
on the PEFT model of a LowBitConfig. Both read recipes/assets/preferences, two pairs a step. What is compared
are the losses and the rewards that both log, and the adapters at the end. About a minute on two cores.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import transformers
import trl
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, begin_step
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.examples import load_examples
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.writer import write_model
from lowbit_ft.grid import IntGrid
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.integrations.callbacks import StepCallback
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.recipe.sections.data import DataSection
from lowbit_ft.recipe.sections.train import TrainSection
from lowbit_ft.signals import SIGNALS, Lesson
from lowbit_ft.signals.reference import StepReference
from lowbit_ft.train.loop import train

ASSETS = Path(__file__).resolve().parents[1] / "recipes" / "assets"
RATE, BETA, LENGTH = 1e-3, 0.1, 256
KEYS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
CASES: dict[str, dict[str, Any]] = {
    "dpo sigmoid": {"kind": "dpo", "loss_type": "sigmoid"},
    "dpo hinge": {"kind": "dpo", "loss_type": "hinge"},
    "dpo ipo": {"kind": "dpo", "loss_type": "ipo"},
    "dpo robust": {"kind": "dpo", "loss_type": "robust", "label_smoothing": 0.1},
    "orpo": {"kind": "orpo"},
}


def packed_base(folder: Path) -> Path:
    """The tiny Llama with its decoder linears at W4 g128, in the native format."""
    checkpoint = Checkpoint.open(ASSETS / "tiny-llama", dtype="float32")
    grid = IntGrid(bits=4, group_size=128, residual_bits=4)
    dense = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-llama", dtype=torch.float32)
    weights = {
        name: CALIBRATORS["mse"].run(module.weight.detach(), grid, Stats())
        for name, module in dense.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    write_model(folder, checkpoint, weights, EXPORTERS["native"])
    return folder


def rows(count: int, plain: bool) -> list[dict[str, Any]]:
    """The first rows of the assets; plain: their words without the chat, for ORPOTrainer."""
    lines = (ASSETS / "preferences" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    found = [json.loads(line) for line in lines]
    if not plain:
        return found
    return [
        {"prompt": f"{row['prompt'][0]['content']}\n"}
        | {name: row[name][0]["content"] for name in ("chosen", "rejected")}
        for row in found
    ]


def ours(base: Path, folder: Path, steps: int, data: list[dict[str, Any]], signal: dict[str, Any]) -> Any:
    model = load_exported(base)
    torch.manual_seed(0)
    attach(model, ADAPTERS["lr_qat"].model_validate({"method": "lr_qat", "rank": 8}))
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    source = {"path": str(file), "format": "preference"}
    section = DataSection.model_validate({"train": source, "sequence_len": 2 * LENGTH, "packing": False})
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = load_examples(section.train, section, tokenizer)
    batches = Batches(examples, 2, tokenizer.pad_token_id, shuffle=False, taught=True)
    train_section = TrainSection.model_validate(
        {
            "max_steps": steps,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": RATE,
            "scheduler": "constant",
            "warmup_ratio": 0.0,
            "signal": {**signal, "beta": BETA},
        }
    )
    kind = SIGNALS[signal["kind"]]
    lesson = Lesson(kind, train_section.signal, StepReference(model) if kind.refers else None)
    train(model, batches, None, train_section, folder, on_step=partial(begin_step, model), lesson=lesson)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(model=model, log=lines)


def theirs(base: Path, folder: Path, steps: int, data: list[dict[str, Any]], signal: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(model, LowBitConfig(method="lr_qat", task_type="CAUSAL_LM", rank=8))
    tokenizer = AutoTokenizer.from_pretrained(base)
    orpo = signal["kind"] == "orpo"
    if orpo:
        tokenizer.bos_token = None  # ORPOTrainer puts one before every prompt, this tokenizer does not
    more = {} if orpo else {k: v for k, v in signal.items() if k != "kind"}
    make_config, make_trainer = cast(Any, (ORPOConfig, ORPOTrainer) if orpo else (DPOConfig, DPOTrainer))
    config = make_config(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        max_length=LENGTH,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        seed=0,
        beta=BETA,
        **more,
    )
    trainer = make_trainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[StepCallback()],
    )
    trainer.train()
    return SimpleNamespace(model=model, log=[e for e in trainer.state.log_history if "loss" in e])


def adapters(model: Any) -> dict[str, torch.Tensor]:
    """What trains, by layer and tensor, whoever holds it."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = name.removeprefix("base_model.model.").split(".lowbit")[0].split(".adapter")[0]
            found[f"{layer}.{name.rpartition('.')[2]}"] = parameter.detach()
    return found


def compare(base: Path, folder: Path, steps: int, signal: dict[str, Any]) -> dict[str, Any]:
    """Both logs, and how far they are apart."""
    folder.mkdir(parents=True)
    data = rows(2 * steps, plain=signal["kind"] == "orpo")
    mine, other = (run(base, folder, steps, data, signal) for run in (ours, theirs))
    assert len(mine.log) == len(other.log) == steps
    logs = {key: ([line[key] for line in mine.log], [line[key] for line in other.log]) for key in KEYS}
    ends = adapters(mine.model), adapters(other.model)
    assert ends[0].keys() == ends[1].keys() and ends[0]
    return {
        "ours": logs["loss"][0],
        "trl": logs["loss"][1],
        "apart": {key: max(abs(a - b) for a, b in zip(*both, strict=True)) for key, both in logs.items()},
        "adapters apart": max(float((ends[0][n] - ends[1][n]).abs().max()) for n in ends[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        base = packed_base(Path(folder, "base"))
        for number, name in enumerate(given.cases.split(",")):
            found["cases"][name] = compare(base, Path(folder, str(number)), given.steps, CASES[name])
            print(name, json.dumps(found["cases"][name]), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
