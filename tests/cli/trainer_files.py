"""A YAML of each trainer that `import-recipe` reads, and the recipe it becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lowbit_ft.cli.import_recipe import import_recipe, render
from lowbit_ft.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]

TINY = ROOT / "recipes" / "assets" / "tiny-llama"

CHAT = ROOT / "recipes" / "assets" / "docstrings" / "train.jsonl"


AXOLOTL_FILE: dict[str, Any] = {
    "base_model": str(TINY),
    "model_type": "LlamaForCausalLM",
    "load_in_8bit": True,
    "load_in_4bit": False,
    "datasets": [
        {
            "path": str(CHAT),
            "ds_type": "json",
            "type": "chat_template",
            "field_messages": "messages",
            "roles_to_train": ["assistant"],
        },
        {"path": "other/rows", "type": "alpaca"},
    ],
    "test_datasets": [{"path": str(CHAT), "type": "chat_template", "split": "train"}],
    "chat_template": "llama3",
    "val_set_size": 0,
    "output_dir": "out/here",
    "adapter": "lora",
    "lora_model_dir": None,
    "sequence_len": 512,
    "sample_packing": False,
    "lora_r": 32,
    "lora_alpha": 16,
    "peft_use_rslora": True,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "v_proj"],
    "gradient_accumulation_steps": 4,
    "micro_batch_size": 2,
    "num_epochs": 4,
    "max_steps": 50,
    "warmup_steps": 5,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant_with_warmup",
    "learning_rate": "2e-4",
    "adam_beta2": 0.95,
    "train_on_inputs": False,
    "eval_steps": 10,
    "use_tensorboard": True,
    "flash_attention": True,
    "tf32": False,
    "lisa_n_layers": 4,
    "weight_decay": "much",
}


FACTORY_FILE: dict[str, Any] = {
    "model_name_or_path": str(TINY),
    "trust_remote_code": True,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset": "mine,identity",
    "template": "llama3",
    "cutoff_len": 256,
    "max_samples": 100,
    "output_dir": "saves/here",
    "logging_steps": 10,
    "save_steps": 500,
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
    "badam_mode": "layer",
}


def written(folder: Path, values: dict[str, Any] | str, name: str = "theirs.yml") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    return path


def imported(folder: Path, values: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """(the recipe as load_recipe reads it, {key that was left: why})."""
    path = written(folder, values)
    draft = import_recipe(path)
    recipe = folder / "recipe.yaml"
    recipe.write_text(render(draft, path, recipe))
    return load_recipe(recipe), dict(draft.left)
