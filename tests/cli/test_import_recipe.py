"""import-recipe: what Axolotl and LLaMA-Factory files become, and that nothing of them is dropped in
silence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowbit_ft.cli.import_draft import Draft, Trainer
from lowbit_ft.cli.import_keys import AXOLOTL, FACTORY, TRAINERS, taken_later
from lowbit_ft.cli.import_recipe import import_recipe, render
from lowbit_ft.cli.main import main
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError

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


def test_axolotl(tmp_path: Path) -> None:
    recipe, left = imported(tmp_path, AXOLOTL_FILE)
    assert recipe.model.path == str(TINY) and recipe.quant.bits == 8
    assert (recipe.adapter.method, recipe.adapter.rank, recipe.adapter.targets) == (
        "dl_qat",
        32,
        ["q_proj", "v_proj"],
    )
    assert recipe.adapter.alpha / recipe.adapter.rank == pytest.approx(16 / 32**0.5)  # rslora's gain
    assert (recipe.data.train.path, recipe.data.train.format, recipe.data.valid.format) == (
        str(CHAT),
        "chat",
        "chat",
    )
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
        "datasets.1",
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
    assert (recipe.data.train.path, recipe.data.train.format, recipe.data.train.limit) == (
        str(CHAT),
        "chat",
        100,
    )
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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", "sixteen"),
        ("max_steps", "many"),
        ("warmup_steps", True),
        ("adam_beta1", "high"),
        ("num_epochs", [1]),
        ("max_steps", float("inf")),
        ("sample_packing", "maybe"),
        ("gradient_checkpointing", "maybe"),
        ("bf16", "maybe"),
        ("train_on_inputs", "maybe"),
        ("peft_use_rslora", "maybe"),
    ],
)
def test_what_cannot_be_read_is_listed_once(key: str, value: Any, tmp_path: Path) -> None:
    draft = import_recipe(written(tmp_path, {"base_model": "a/b", "adapter": "lora", key: value}))
    assert [why for name, why in draft.left if name == key and "is needed" in why] and [
        name for name, _ in draft.left
    ].count(key) == 1
    assert not any(key in source for _, source in draft.values.values())


def test_true_and_false_as_words(tmp_path: Path) -> None:
    draft = import_recipe(
        written(
            tmp_path,
            {
                "base_model": "a/b",
                "adapter": "lora",
                "sample_packing": "false",
                "gradient_checkpointing": "unsloth",
                "train_on_inputs": "true",
                "bf16": "auto",
                "fp16": "false",
            },
        )
    )
    assert draft.get("data.packing") is False and draft.get("train.gradient_checkpointing") is True
    assert draft.get("data.train_on") == "all" and draft.get("model.dtype") == "bfloat16"


@pytest.mark.parametrize("order", [("load_in_4bit", "load_in_8bit"), ("load_in_8bit", "load_in_4bit")])
def test_two_widths_at_once_are_named(order: tuple[str, str], tmp_path: Path) -> None:
    draft = import_recipe(
        written(tmp_path, {"base_model": "a/b", "adapter": "lora"} | dict.fromkeys(order, True))
    )
    assert draft.get("quant.bits") == 4 and "load_in_4bit is true too" in dict(draft.left)["load_in_8bit"]


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


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=lambda trainer: trainer.name)
def test_keys_for_later_are_looked_at_later(trainer: Trainer, tmp_path: Path) -> None:
    seen: set[str] = set()

    class Seen(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            seen.add(key)
            return super().get(key, default)

    draft = Draft(
        trainer.name,
        Seen(dict.fromkeys(trainer.rules) | {"lora_alpha": 1, "lora_target_modules": ["q_proj"]}),
        tmp_path,
    )
    if "dataset" in trainer.rules:
        trainer.rules["dataset"](draft, "dataset", "rows")
    trainer.finish(draft)
    assert {key for key, rule in trainer.rules.items() if rule is taken_later} - seen == set()


def test_a_data_set_that_is_not_described_is_left_to_the_user(tmp_path: Path) -> None:
    draft = import_recipe(written(tmp_path, FACTORY_FILE | {"dataset": "identity", "mask_history": True}))
    assert "identity is not in a dataset_info.json" in dict(draft.left)["dataset"]
    assert draft.get("data.train.path") == "identity" and draft.get("data.train_on") == "completion"


@pytest.mark.parametrize("values", [AXOLOTL_FILE, FACTORY_FILE], ids=["axolotl", "llamafactory"])
def test_every_key_is_used_or_listed(values: dict[str, Any], tmp_path: Path) -> None:
    """A key that is set to something changes the recipe or is named in its list; the exceptions say nothing
    about training.
    """
    silent = {"do_train"}
    off = {key for key, value in values.items() if value in (None, False, 0, "none", "all")}
    draft = import_recipe(written(tmp_path, values))
    text = render(draft, tmp_path / "theirs.yml", tmp_path / "recipe.yaml")
    for key in set(values) - silent - off - {"stage", "finetuning_type", "adapter"}:
        assert key in text, key
    assert "Left out of theirs.yml" in text


def test_every_rule_sets_keys_that_recipes_have(tmp_path: Path) -> None:
    """Both tables, key by key, over a file with only the model: whatever a rule sets must be a key of the
    schema.
    """
    from lowbit_ft.recipe.recipe import recipe_schema

    schema = recipe_schema()
    known = {name for definition in schema["$defs"].values() for name in definition.get("properties", {})} | {
        "output"
    }
    values: list[Any] = [
        1,
        2,
        0.5,
        "true",
        True,
        "cosine",
        "adamw_torch",
        ["q_proj"],
        "q_proj,k_proj",
        [{"path": "x", "type": "alpaca"}],
    ]
    tried = 0
    for table, trainer in zip((AXOLOTL, FACTORY), TRAINERS.values(), strict=True):
        for key in table:
            for value in values:
                try:
                    draft = import_recipe(written(tmp_path, {trainer.model_key: "a/b", key: value}))
                except RecipeError as error:
                    assert "supervised fine-tuning only" in str(error) or key == trainer.model_key
                    continue
                assert all(part in known for path in draft.values for part in path.split(".")[1:]), (
                    draft.values
                )
                tried += 1
    assert tried > 800


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "got the keys a; allowed: a file with base_model .Axolotl. or model_name_or_path"),
        ("base_model: a\nmodel_name_or_path: b\n", "one of them"),
        ("model: {path: x}\ntrain: {}\n", "got a recipe of ours"),
        ("base_model: a\nrl: dpo\n", "theirs.yml:2: rl: got 'dpo'; allowed: supervised fine-tuning only"),
        ("model_name_or_path: a\nstage: dpo\n", "theirs.yml:2: stage: got 'dpo'"),
        (
            "base_model: !!python/object/apply:os.system [ls]\n",
            "base_model: got .'ls'.; allowed: a folder or a hub id",
        ),
        ("base_model: !!python/name:os.system x\n", "the tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("base_model: a\nbase_model: b\n", "the key twice"),
        ("- a\n", "got a list"),
        ("base_model: [\n", "not YAML"),
        (
            "a: &a [1,2,3,4,5,6,7,8,9]\n"
            + "".join(
                f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefg", "bcdefgh", strict=True)
            ),
            "more than",
        ),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        import_recipe(written(tmp_path, text))


def test_text_that_would_break_a_comment_or_the_yaml(tmp_path: Path) -> None:
    values = {
        "base_model": str(TINY),
        "datasets": [{"path": str(CHAT), "type": "chat_template"}],
        "max_steps": 3,
        "sequence_len": 64,
        "chat_template_jinja": "a\n# b: c\nname: x",
        "output_dir": "a: b # c\nname: evil",
        "adapter": "lora",
    }
    recipe, left = imported(tmp_path, values)
    assert recipe.name == "theirs" and str(recipe.output) == "a: b # c\nname: evil"
    assert "chat_template_jinja" in left


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path, AXOLOTL_FILE)
    out = tmp_path / "recipe.yaml"

    def call(*arguments: str) -> int:
        with pytest.raises(SystemExit) as done:
            main(["import-recipe", str(source), "-o", str(out), *arguments])
        return int(done.value.code or 0)

    assert call() == 0
    said = capsys.readouterr()
    assert "(Axolotl)" in said.out and "left: lisa_n_layers: no key here does this" in said.err
    assert load_recipe(out).name == "theirs"
    assert call() == 2 and "exists; nothing was written" in capsys.readouterr().err
    assert call("--force") == 0
