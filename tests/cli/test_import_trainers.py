"""What the keys of each trainer become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit_ft.cli.import_recipe import import_recipe
from tests.cli.trainer_files import AXOLOTL_FILE, CHAT, FACTORY_FILE, TINY, imported, written


def test_axolotl(tmp_path: Path) -> None:
    recipe, left = imported(tmp_path, AXOLOTL_FILE)
    assert recipe.model.path == str(TINY) and recipe.quant.bits == 8
    assert (recipe.adapter.method, recipe.adapter.rank, recipe.adapter.targets) == (
        "dl_qat",
        32,
        ["q_proj", "v_proj"],
    )
    assert recipe.adapter.alpha / recipe.adapter.rank == pytest.approx(16 / 32**0.5)  # rslora's gain
    assert [(source.path, source.format, source.weight) for source in recipe.data.train] == [
        (str(CHAT), "chat", None),
        ("other/rows", "alpaca", None),
    ]
    assert recipe.data.valid.format == "chat"
    assert (recipe.data.sequence_len, recipe.data.packing, recipe.data.train_on) == (512, False, "assistant")
    train = recipe.train
    assert (train.max_steps, train.epochs, train.warmup_ratio, train.eval_every) == (50, None, 0.1, 10)
    assert (train.optimizer, train.scheduler, train.learning_rate, train.betas) == (
        "adamw",
        "constant",
        2e-4,
        (0.9, 0.95),
    )
    assert (train.micro_batch_size, train.gradient_accumulation_steps, train.trackers) == (
        2,
        4,
        ["tensorboard"],
    )
    assert str(recipe.output) == "out/here"
    wanted = {
        "model_type",
        "datasets.0.roles_to_train",
        "chat_template",
        "lora_dropout",
        "num_epochs",
        "flash_attention",
        "lisa_n_layers",
        "weight_decay",
    }
    assert set(left) == wanted
    assert left["lisa_n_layers"] == "no key here does this" and "could not convert" in left["weight_decay"]


def test_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(
        json.dumps({"mine": {"file_name": str(CHAT), "formatting": "sharegpt"}})
    )
    recipe, left = imported(tmp_path, FACTORY_FILE)
    assert (recipe.model.path, recipe.model.dtype, recipe.quant.bits) == (str(TINY), "bfloat16", 4)
    assert (recipe.adapter.method, recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.targets) == (
        "dl_qat",
        8,
        16.0,
        None,
    )
    assert [(source.path, source.format, source.limit) for source in recipe.data.train] == [
        (str(CHAT), "chat", 100),
        ("identity", "alpaca", 100),
    ]
    assert (
        recipe.train.epochs,
        recipe.train.warmup_ratio,
        recipe.train.save_every,
        recipe.train.gradient_checkpointing,
    ) == (3.0, 0.1, 500, True)
    assert set(left) == {"trust_remote_code", "dataset", "template", "ddp_timeout", "badam_mode"}
    assert "never run" in left["trust_remote_code"] and "identity" in left["dataset"]


def test_the_rarer_keys(tmp_path: Path) -> None:
    """What needs several keys, or is their default."""
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"hub": {"hf_hub_url": "org/rows", "subset": "en", "columns": {"prompt": "q"}}})
    )
    draft = import_recipe(
        written(
            tmp_path,
            {
                "model_name_or_path": "org/model",
                "stage": "pt",
                "finetuning_type": "full",
                "dataset": "hub",
                "eval_dataset": "hub",
                "quantization_bit": 5,
                "report_to": ["wandb", "mlflow"],
                "use_rslora": True,
                "lora_rank": 16,
                "lora_alpha": 4,
                "max_steps": -1,
                "warmup_steps": 20,
                "save_steps": 0.1,
                "eval_steps": 5,
                "optim": "adafactor",
                "lora_target": "q_proj, v_proj",
                "disable_gradient_checkpointing": True,
            },
        )
    )
    left = dict(draft.left)
    assert (draft.get("data.train.path"), draft.get("data.train.name"), draft.get("data.train.format")) == (
        "org/rows",
        "en",
        "text",
    )
    assert (
        draft.get("data.train_on") == "all"
        and draft.get("train.epochs") == 3.0
        and draft.get("adapter.alpha") == 16.0
    )
    assert (
        draft.get("adapter.targets") == ["q_proj", "v_proj"]
        and draft.get("train.gradient_checkpointing") is False
    )
    assert (
        draft.get("train.trackers") == ["wandb"]
        and "mlflow" in left["report_to"]
        and draft.get("train.eval_every") == 5
    )
    assert {"finetuning_type", "quantization_bit", "warmup_steps", "save_steps", "optim", "dataset"} <= set(
        left
    )
    draft = import_recipe(
        written(
            tmp_path,
            {
                "base_model": "org/model",
                "adapter": "ia3",
                "lora_target_linear": True,
                "lora_target_modules": ["q_proj"],
                "eval_steps": 5,
                "datasets": [{"path": "a/b", "type": "input_output", "revision": "x"}],
            },
        )
    )
    left = dict(draft.left)
    assert (
        draft.get("data.train.format") == "chat"
        and "a guess" in left["datasets.0.type"]
        and draft.get("data.train.revision") == "x"
    )
    assert {"adapter", "lora_target_modules", "eval_steps"} <= set(left) and draft.get(
        "adapter.targets"
    ) is None


def test_keys_of_llama_factory_that_imply_others(tmp_path: Path) -> None:
    valid = {"model_name_or_path": "a/b", "eval_dataset": "rows", "eval_steps": 5}
    draft = import_recipe(
        written(
            tmp_path,
            valid | {"packing": False, "neat_packing": True, "eval_strategy": "no", "do_train": False},
        )
    )
    left = dict(draft.left)
    assert draft.get("data.packing") is True and draft.get("train.eval_every") is None
    assert left["eval_steps"] == "eval_strategy is no" and "always trains" in left["do_train"]
    draft = import_recipe(written(tmp_path, valid | {"eval_strategy": "epoch"}))
    assert "train.eval_every" in dict(draft.left)["eval_strategy"] and draft.get("train.eval_every") is None
    assert import_recipe(written(tmp_path, valid | {"eval_strategy": "steps"})).get("train.eval_every") == 5


@pytest.mark.parametrize("order", [("load_in_4bit", "load_in_8bit"), ("load_in_8bit", "load_in_4bit")])
def test_two_widths_at_once_are_named(order: tuple[str, str], tmp_path: Path) -> None:
    draft = import_recipe(
        written(tmp_path, {"base_model": "a/b", "adapter": "lora"} | dict.fromkeys(order, True))
    )
    assert draft.get("quant.bits") == 4 and "load_in_4bit is true too" in dict(draft.left)["load_in_8bit"]


def test_a_data_set_that_is_not_described_is_left_to_the_user(tmp_path: Path) -> None:
    draft = import_recipe(written(tmp_path, FACTORY_FILE | {"dataset": "identity", "mask_history": True}))
    assert "identity is not in a dataset_info.json" in dict(draft.left)["dataset"]
    assert draft.get("data.train.path") == "identity" and draft.get("data.train_on") == "completion"


@pytest.mark.parametrize("trainer", ["axolotl", "llama-factory"])
def test_noise_and_an_early_end(trainer: str, tmp_path: Path) -> None:
    """Without data to evaluate on there is nothing to wait for."""
    noise, wait = {
        "axolotl": ("neftune_noise_alpha", "early_stopping_patience"),
        "llama-factory": ("neftune_alpha", "early_stopping_steps"),
    }[trainer]
    evaluated = {"test_datasets": [{"path": str(CHAT), "type": "chat_template"}], "eval_steps": 10}
    rows = [{"path": str(CHAT), "type": "chat_template"}]
    file: dict[str, Any] = {"base_model": str(TINY), "datasets": rows}
    if trainer == "llama-factory":
        file = {"model_name_or_path": str(TINY), "dataset": str(CHAT)}
        evaluated = {"eval_dataset": str(CHAT), "eval_strategy": "steps", "eval_steps": 10}
    file |= {noise: 5, wait: 3}
    draft = import_recipe(written(tmp_path, file | evaluated))
    assert (draft.get("train.neftune_alpha"), draft.get("train.stop_after")) == (5.0, 3)
    assert draft.get("train.keep_best") is True and wait not in dict(draft.left)
    draft = import_recipe(written(tmp_path, file))
    assert draft.get("train.stop_after") is None
    assert "nothing is evaluated while training" in dict(draft.left)[wait]


def test_modules_that_train_whole_and_new_tokens(tmp_path: Path) -> None:
    """At the one rate of their file, unless it says another."""
    keys: dict[str, Any] = {"lora_modules_to_save": ["embed_tokens", "lm_head"], "tokens": ["zorglub"]}
    keys["special_tokens"] = {"pad_token": "<|pad|>", "additional_special_tokens": ["<|tool|>"]}
    recipe, left = imported(tmp_path, AXOLOTL_FILE | keys)
    assert recipe.adapter.modules_to_save == ["embed_tokens", "lm_head"]
    assert recipe.model.add_tokens.tokens == ["zorglub"] and not recipe.model.add_tokens.special
    assert recipe.train.modules_learning_rate == recipe.train.learning_rate == 2e-4
    assert "pad_token" in left["special_tokens"]
    assert "all special here, or none" in left["special_tokens.additional_special_tokens"]
    recipe, left = imported(tmp_path, AXOLOTL_FILE | keys | {"tokens": [], "embedding_lr": 5e-5})
    assert recipe.model.add_tokens.tokens == ["<|tool|>"] and recipe.model.add_tokens.special
    assert recipe.train.modules_learning_rate == 5e-5
    draft = import_recipe(written(tmp_path, AXOLOTL_FILE | {"embedding_lr": 5e-5}))
    assert ("embedding_lr", "nothing trains beside the adapters") in draft.left

    keys = {"additional_target": "embed_tokens,lm_head", "resize_vocab": True}
    recipe, left = imported(tmp_path, FACTORY_FILE | keys | {"add_special_tokens": "<|tool|>,<|call|>"})
    assert recipe.adapter.modules_to_save == ["embed_tokens", "lm_head"] and "resize_vocab" not in left
    assert recipe.model.add_tokens.tokens == ["<|tool|>", "<|call|>"] and recipe.model.add_tokens.special
    draft = import_recipe(written(tmp_path, FACTORY_FILE | keys))
    assert not draft.get("model.add_tokens.tokens") and "resize_vocab" in dict(draft.left)
