"""`lowbit-ft import-recipe`: every key of another trainer is used or listed, and other files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowbit_ft.cli.import_draft import Draft, Trainer
from lowbit_ft.cli.import_recipe import TRAINERS, import_recipe, render
from lowbit_ft.cli.import_rules import taken_later
from lowbit_ft.cli.main import main
from lowbit_ft.recipe.recipe import load_recipe, recipe_schema
from lowbit_ft.recipe.yaml import RecipeError
from tests.cli.trainer_files import AXOLOTL_FILE, CHAT, FACTORY_FILE, TINY, imported, written


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
    for trainer in TRAINERS.values():
        for key in trainer.rules:
            for value in values:
                try:
                    draft = import_recipe(written(tmp_path, {trainer.model_key: "a/b", key: value}))
                except RecipeError as error:
                    assert "nothing was written" in str(error) or key == trainer.model_key
                    continue
                assert all(
                    part in known or part.isdecimal() for path in draft.values for part in path.split(".")[1:]
                ), draft.values
                tried += 1
    assert tried > 800


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "got the keys a; allowed: a file with base_model .Axolotl. or model_name_or_path"),
        ("base_model: a\nmodel_name_or_path: b\n", "one of them"),
        ("model: {path: x}\ntrain: {}\n", "got a recipe of ours"),
        (
            "base_model: a\nrl: kto\n",
            "theirs.yml:2: rl: got 'kto'; allowed: dpo, ipo, orpo, or none; other obj",
        ),
        ("base_model: a\nreward_model: true\n", "theirs.yml:2: reward_model: got True; no reward model"),
        ("model_name_or_path: a\nstage: rm\n", "theirs.yml:2: stage: got 'rm'; allowed: sft, pt, dpo; other"),
        ("model_name_or_path: a\nstage: dpo\npref_loss: simpo\n", "pref_loss: got 'simpo'; allowed: sigmoid"),
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
        "hub_model_id": "a\n# b: c\nname: x",
        "output_dir": "a: b # c\nname: evil",
        "adapter": "lora",
    }
    recipe, left = imported(tmp_path, values)
    assert recipe.name == "theirs" and str(recipe.output) == "a: b # c\nname: evil"
    assert "hub_model_id" in left


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
