"""Chat templates and preferences of other trainers: a row for each key and value, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit_ft.cli.import_recipe import import_recipe, render
from tests.cli.trainer_files import CHAT, TINY, imported, written

AXOLOTL, FACTORY = "base_model", "model_name_or_path"
TEMPLATE, KWARGS = "data.chat_template", "data.chat_template_kwargs"
KIND, LOSS, BETA = "train.signal.kind", "train.signal.loss_type", "train.signal.beta"
DPO = {"rl": "dpo"}
# (the trainer, its keys, what is set of these keys of ours, {key of theirs that is left: words of why})
ROWS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, str]]] = [
    (AXOLOTL, {"chat_template": "chatml"}, {TEMPLATE: "chatml"}, {}),
    (AXOLOTL, {"chat_template": "tokenizer_default"}, {}, {}),
    (AXOLOTL, {"chat_template": "llama3"}, {}, {"chat_template": "their own copy"}),
    (AXOLOTL, {"chat_template": "tokenizer_default_fallback_chatml"}, {}, {"chat_template": "has none, set"}),
    (AXOLOTL, {"chat_template": "jinja", "chat_template_jinja": "a.jinja"}, {TEMPLATE: "a.jinja"}, {}),
    (AXOLOTL, {"chat_template_jinja": "{{ messages }}"}, {TEMPLATE: "{{ messages }}"}, {}),
    (AXOLOTL, {"chat_template": "jinja"}, {}, {"chat_template": "is not in it"}),
    (
        AXOLOTL,
        {"chat_template": "chatml", "chat_template_jinja": "a.jinja"},
        {},
        {"chat_template_jinja": "chat_template: chatml says which"},
    ),
    (AXOLOTL, {"chat_template_kwargs": {"enable_thinking": False}}, {KWARGS: {"enable_thinking": False}}, {}),
    (AXOLOTL, {"chat_template_kwargs": "no"}, {}, {"chat_template_kwargs": "names with values are needed"}),
    (AXOLOTL, {"rl": "dpo"}, {KIND: "dpo"}, {}),
    (AXOLOTL, {"rl": "ipo"}, {KIND: "dpo", LOSS: "ipo"}, {}),
    (AXOLOTL, {"rl": "orpo"}, {KIND: "orpo"}, {}),
    (AXOLOTL, {"rl": False}, {}, {}),
    (AXOLOTL, {**DPO, "rl_beta": 0.3}, {KIND: "dpo", BETA: 0.3}, {}),
    (AXOLOTL, {**DPO, "dpo_beta": "0.2"}, {KIND: "dpo", BETA: 0.2}, {}),
    (AXOLOTL, {"rl": "orpo", "orpo_alpha": 0.2}, {KIND: "orpo", BETA: 0.2}, {}),
    (
        AXOLOTL,
        {**DPO, "rl_beta": 0.3, "trl": {"beta": 0.4, "use_vllm": True}},
        {KIND: "dpo", BETA: 0.4},
        {"rl_beta": "trl.beta says it", "trl.use_vllm": "stay TRL's"},
    ),
    (AXOLOTL, {"rl_beta": 0.3}, {}, {"rl_beta": "does not train on"}),
    (AXOLOTL, {**DPO, "rl_beta": 0}, {KIND: "dpo"}, {"rl_beta": "is above 0"}),
    (AXOLOTL, {**DPO, "dpo_label_smoothing": 0.1}, {KIND: "dpo"}, {"dpo_label_smoothing": "robust"}),
    (AXOLOTL, {**DPO, "rpo_alpha": 1.0}, {KIND: "dpo"}, {"rpo_alpha": "no cross entropy"}),
    (
        AXOLOTL,
        {**DPO, "rl_adapter_ref_model": True},
        {KIND: "dpo"},
        {"rl_adapter_ref_model": "adapters off"},
    ),
    (FACTORY, {"template": "chatml"}, {TEMPLATE: "chatml"}, {}),
    (FACTORY, {"template": "qwen3"}, {}, {"template": "their own copy"}),
    (FACTORY, {"enable_thinking": False}, {KWARGS: {"enable_thinking": False}}, {}),
    (FACTORY, {"enable_thinking": True}, {}, {"enable_thinking": "empty thoughts"}),
    (FACTORY, {"stage": "dpo"}, {KIND: "dpo"}, {}),
    (FACTORY, {"stage": "dpo", "pref_loss": "sigmoid"}, {KIND: "dpo"}, {}),
    (FACTORY, {"stage": "dpo", "pref_loss": "hinge"}, {KIND: "dpo", LOSS: "hinge"}, {}),
    (FACTORY, {"stage": "dpo", "pref_loss": "ipo"}, {KIND: "dpo", LOSS: "ipo"}, {}),
    (FACTORY, {"stage": "dpo", "pref_loss": "orpo", "pref_beta": 0.2}, {KIND: "orpo", BETA: 0.2}, {}),
    (FACTORY, {"stage": "dpo", "pref_ftx": 0.0}, {KIND: "dpo"}, {}),
    (FACTORY, {"stage": "dpo", "pref_ftx": 0.5}, {KIND: "dpo"}, {"pref_ftx": "no cross entropy"}),
    (FACTORY, {"stage": "sft", "pref_beta": 0.1}, {}, {"pref_beta": "this file is not"}),
    (
        FACTORY,
        {"stage": "dpo", "ref_model": "a/b", "dpo_label_smoothing": 0.1, "simpo_gamma": 0.5, "ld_alpha": 0.5},
        {KIND: "dpo"},
        {
            "ref_model": "adapters off",
            "dpo_label_smoothing": "robust",
            "simpo_gamma": "no SimPO",
            "ld_alpha": "count alike",
        },
    ),
    (FACTORY, {"stage": "dpo", "pref_bco_weight": 1.0}, {KIND: "dpo"}, {"pref_bco_weight": "no classifier"}),
]


@pytest.mark.parametrize(("trainer", "keys", "ours", "left"), ROWS, ids=lambda row: str(row)[:60])
def test_each_key_is_mapped_or_left(
    trainer: str, keys: dict[str, Any], ours: dict[str, Any], left: dict[str, str], tmp_path: Path
) -> None:
    path = written(tmp_path, {trainer: "a/b", **keys})
    draft = import_recipe(path)
    looked = (TEMPLATE, KWARGS, KIND, LOSS, BETA)
    assert {key: draft.get(key) for key in looked if key in draft.values} == ours
    why = {key: reason for key, reason in draft.left if key.split(".")[0] in keys}
    assert why.keys() == left.keys() and all(left[key] in why[key] for key in left)
    text = render(draft, path, tmp_path / "recipe.yaml")
    assert all(key.rpartition(".")[2] in text for key in (*ours, *left))


@pytest.mark.parametrize(
    ("kind", "rl", "same"),
    [
        ("passthrough", "dpo", True),
        ("chatml.ultra", "dpo", True),
        ("chat_template.argilla_chat", "ipo", True),
        ("chat_template.argilla", "orpo", True),
        ("chatml.intel", "dpo", False),
        ("chat_template.default", "dpo", False),
        ("user_defined.default", "dpo", False),
    ],
)
def test_axolotl_preference_rows(kind: str, rl: str, same: bool, tmp_path: Path) -> None:
    values = {AXOLOTL: "a/b", "rl": rl, "datasets": [{"path": "o/pairs", "type": kind}]}
    draft = import_recipe(written(tmp_path, values))
    assert draft.get("data.train.format") == "preference" and draft.get("data.train_on") == "completion"
    assert ("datasets.0.type" in dict(draft.left)) is not same


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            {"ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}},
            "stays",
        ),
        ({"ranking": True, "columns": {"prompt": "q", "chosen": "a", "rejected": "b"}}, "name them so"),
        ({"ranking": True, "formatting": "sharegpt"}, "name them so"),
        ({}, "no data set of rankings"),
    ],
)
def test_factory_preference_rows(entry: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"hf_hub_url": "o/pairs", **entry}}))
    values = {FACTORY: "a/b", "stage": "dpo", "dataset": "mine", "dataset_dir": str(tmp_path)}
    draft = import_recipe(written(tmp_path, values))
    assert draft.get("data.train.format") == "preference"
    (left,) = [why for key, why in draft.left if key == "dataset"]
    assert words in left


def test_the_recipe_that_comes_out_is_checked_and_read(tmp_path: Path) -> None:
    values = {
        AXOLOTL: str(TINY),
        "adapter": "lora",
        "datasets": [{"path": str(CHAT), "type": "chat_template", "chat_template": "tokenizer_default"}],
        "chat_template_jinja": "{{ messages[0].content }}{{ thoughts }}\n",
        "chat_template_kwargs": {"thoughts": False},
        "micro_batch_size": 1,
    }
    recipe, left = imported(tmp_path, values)
    assert recipe.data.chat_template == values["chat_template_jinja"] and not left
    assert recipe.data.chat_template_kwargs == {"thoughts": False}
