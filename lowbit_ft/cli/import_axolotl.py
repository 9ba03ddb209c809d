"""The keys of Axolotl, and what each becomes here."""

from __future__ import annotations

from typing import Any

from .import_chat import axolotl_beta, axolotl_rl, axolotl_template, template_kwargs
from .import_draft import Draft, Trainer
from .import_rows import axolotl_rows
from .import_rules import (
    ATTENTION,
    CACHE,
    OPTIMIZER_NAMES,
    SCHEDULERS,
    SHARED,
    chosen,
    finish,
    flag,
    if_not_off,
    if_true,
    left,
    modules,
    new_tokens,
    number,
    on,
    refuse_reward,
    taken_later,
    targets,
    text,
    truth,
)

_EVERY = left("no fraction of an epoch here: set train.eval_every or save_every to a number of steps")


def _adapter(draft: Draft, key: str, value: Any) -> None:
    if value not in ("lora", "qlora"):
        draft.leave(key, "only LoRA has a like here; dl_qat is set")
    elif value == "qlora" and draft.get("quant.bits") is None:
        draft.set("quant.bits", 4, f"{key}: qlora")


def _shuffled(draft: Draft, key: str, value: Any) -> None:
    if truth(value) is not True:
        draft.leave(key, "rows of several sources are shuffled together")


def _special_tokens(draft: Draft, key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError("a mapping is needed")
    roles = sorted(name for name in value if name != "additional_special_tokens")
    if more := value.get("additional_special_tokens"):
        new_tokens(True)(draft, f"{key}.additional_special_tokens", more)
    if roles:
        draft.leave(
            key, f"which token is the {', '.join(roles)} is the tokenizer's own: change tokenizer_config.json"
        )


def _finish(draft: Draft) -> None:
    axolotl_template(draft)
    axolotl_beta(draft)
    theirs = draft.theirs
    if "adapter" not in theirs or theirs["adapter"] is None:
        draft.leave(
            "adapter", "full fine-tuning is not done here: an adapter (dl_qat) trains over the packed model"
        )
    targets_given = theirs.get("lora_target_modules")
    if targets_given and on(draft, "lora_target_linear"):
        draft.leave(
            "lora_target_modules", "lora_target_linear asks for all linear layers, which have adapters here"
        )
        draft.values.pop("adapter.targets", None)
    if on(draft, "load_in_4bit") and on(draft, "load_in_8bit"):
        draft.set("quant.bits", 4, "load_in_4bit")
        draft.leave(
            "load_in_8bit", "load_in_4bit is true too, and one of them has to give: set quant.bits to 4 or 8"
        )
    everything = on(draft, "train_on_inputs")
    finish(
        draft,
        everything,
        rank_key="lora_r",
        rslora=on(draft, "peft_use_rslora"),
        epochs=1.0,
        epochs_key="num_epochs",
    )


RULES = SHARED | {
    "base_model": text("model.path"),
    "revision_of_model": text("model.revision"),
    "load_in_4bit": if_true("quant.bits", 4),
    "load_in_8bit": if_true("quant.bits", 8),
    "gptq": left("the grid of a quantized checkpoint is read from its config.json"),
    "datasets": axolotl_rows,
    "test_datasets": axolotl_rows,
    "shuffle_merged_datasets": _shuffled,
    "adapter": _adapter,
    "lora_r": number("adapter.rank", 1),
    "lora_target_modules": targets,
    "lora_target_linear": taken_later,
    "lora_model_dir": text("adapter.init_from"),
    "peft_use_rslora": taken_later,
    "peft_use_dora": left("no DoRA here; dl_qat trains a magnitude per group"),
    "lora_modules_to_save": if_not_off(modules),
    "embedding_lr": number("train.modules_learning_rate", 1e-12, whole=False),
    "tokens": if_not_off(new_tokens(False)),
    "lora_fan_in_fan_out": left("layers are nn.Linear here"),
    "sequence_len": number("data.sequence_len", 8),
    "sample_packing": flag("data.packing"),
    "train_on_inputs": taken_later,
    "micro_batch_size": number("train.micro_batch_size", 1),
    "num_epochs": taken_later,
    "lr_scheduler": chosen("train.scheduler", SCHEDULERS),
    "optimizer": chosen("train.optimizer", OPTIMIZER_NAMES),
    "cosine_min_lr_ratio": number("train.min_lr_ratio", whole=False),
    "wandb_project": if_not_off(lambda draft, key, value: draft.set("train.trackers", ["wandb"], key)),
    "chat_template": taken_later,
    "chat_template_jinja": taken_later,
    "chat_template_kwargs": template_kwargs,
    "rl": if_not_off(axolotl_rl),
    "rl_beta": taken_later,
    "orpo_alpha": taken_later,
    "dpo_beta": taken_later,
    "trl": taken_later,
    "dpo_label_smoothing": left(
        "theirs has no effect on DPO's loss; signal.loss_type: robust counts wrong pairs"
    ),
    "rpo_alpha": left("no cross entropy beside DPO here; signal.kind: orpo has one"),
    "rl_adapter_ref_model": left("the reference is the packed base with its adapters off"),
    "reward_model": if_not_off(refuse_reward),
    "flash_attention": ATTENTION,
    "attn_implementation": ATTENTION,
    "xformers_attention": ATTENTION,
    "sdp_attention": left("it is the default (model.attention)"),
    "evals_per_epoch": _EVERY,
    "saves_per_epoch": _EVERY,
    "model_type": left("config.json says so"),
    "tokenizer_type": left("tokenizer_config.json says so"),
    "dataset_prepared_path": CACHE,
    "pad_to_sequence_len": left("windows are padded to the longest of their batch"),
    "strict": left("a recipe is always checked key by key"),
    "group_by_length": left("rows are packed instead"),
    "eval_sample_packing": left("evaluation windows are packed as training's are"),
    "early_stopping_patience": number("train.stop_after", 1),
    "special_tokens": if_not_off(_special_tokens),
}

AXOLOTL = Trainer("Axolotl", "base_model", RULES, _finish)
