"""The keys of LLaMA-Factory, and what each becomes here."""

from __future__ import annotations

from typing import Any

from ..grid.integer import BITS
from .import_chat import factory_loss, factory_stage, factory_template, factory_thinking
from .import_draft import Draft, Trainer
from .import_rows import factory_mixture, factory_rows
from .import_rules import (
    ATTENTION,
    CACHE,
    OPTIMIZER_NAMES,
    RUNTIME,
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
    taken_later,
    targets,
    text,
    trackers,
    truth,
)


def _type(draft: Draft, key: str, value: Any) -> None:
    if value != "lora":
        draft.leave(
            key,
            "full and frozen fine-tuning are not done here: an adapter (dl_qat) trains over the packed model",
        )


def _train(draft: Draft, key: str, value: Any) -> None:
    if truth(value) is not True:
        draft.leave(key, "a run always trains")


def _resized(draft: Draft, key: str, value: Any) -> None:
    if truth(value) is True and not any(draft.theirs.get(k) for k in ("add_tokens", "add_special_tokens")):
        draft.leave(key, "embedding and head grow where model.add_tokens needs it, and by nothing else")


def _bits(draft: Draft, key: str, value: Any) -> None:
    if value in BITS:
        draft.set("quant.bits", value, key)
    else:
        draft.leave(key, f"quant.bits is one of {', '.join(map(str, BITS))}")


def _finish(draft: Draft) -> None:
    factory_loss(draft)
    theirs = draft.theirs
    if theirs.get("stage") == "pt":
        for place in draft.sources("data.train"):
            draft.set(f"{place}.format", "text", "stage: pt")
    places = draft.sources("data.train")
    if len(places) > 1 and "data.train.limit" in draft.values:
        limit, origin = draft.values.pop("data.train.limit")
        for place in places:
            draft.set(f"{place}.limit", limit, origin)
    factory_mixture(draft)
    if "lora_rank" not in theirs:
        draft.set("adapter.rank", 8, "their default")
    if "lora_alpha" not in theirs:
        draft.theirs = theirs | {"lora_alpha": 2 * draft.get("adapter.rank", 8)}
    if on(draft, "mask_history"):
        draft.set("data.train_on", "completion", "mask_history: only the last answer")
    if theirs.get("gradient_checkpointing") is None:
        draft.set(
            "train.gradient_checkpointing",
            not on(draft, "disable_gradient_checkpointing"),
            "their default, or disable_gradient_checkpointing",
        )
    if on(draft, "neat_packing"):
        draft.set("data.packing", True, "neat_packing: packed rows never see each other here")
    everything = on(draft, "train_on_prompt")
    finish(
        draft,
        everything,
        rank_key="lora_rank",
        rslora=on(draft, "use_rslora"),
        epochs=3.0,
        epochs_key="num_train_epochs",
    )


RULES = SHARED | {
    "model_name_or_path": text("model.path"),
    "model_revision": text("model.revision"),
    "stage": factory_stage,
    "pref_loss": taken_later,
    "pref_beta": taken_later,
    "pref_ftx": taken_later,
    "pref_bco_weight": left("no classifier beside DPO here"),
    "dpo_label_smoothing": left("another formula than here: signal.loss_type: robust counts wrong pairs"),
    "simpo_gamma": left("no SimPO here"),
    "ld_alpha": left("all tokens of an answer count alike here"),
    "ref_model": left("the reference is the packed base with its adapters off"),
    "finetuning_type": _type,
    "quantization_bit": _bits,
    "lora_rank": number("adapter.rank", 1),
    "lora_target": targets,
    "adapter_name_or_path": text("adapter.init_from"),
    "use_rslora": taken_later,
    "use_dora": left("no DoRA here; dl_qat trains a magnitude per group"),
    "additional_target": if_not_off(modules),
    "add_tokens": if_not_off(new_tokens(False)),
    "add_special_tokens": if_not_off(new_tokens(True)),
    "resize_vocab": _resized,
    "dataset": factory_rows,
    "eval_dataset": factory_rows,
    "dataset_dir": taken_later,
    "mix_strategy": taken_later,
    "interleave_probs": taken_later,
    "template": factory_template,
    "enable_thinking": factory_thinking,
    "cutoff_len": number("data.sequence_len", 8),
    "max_samples": number("data.train.limit", 1),
    "packing": flag("data.packing"),
    "neat_packing": taken_later,
    "train_on_prompt": taken_later,
    "mask_history": taken_later,
    "streaming": flag("data.streaming"),
    "per_device_train_batch_size": number("train.micro_batch_size", 1),
    "num_train_epochs": taken_later,
    "lr_scheduler_type": chosen("train.scheduler", SCHEDULERS),
    "optim": chosen("train.optimizer", OPTIMIZER_NAMES),
    "pure_bf16": if_true("model.dtype", "bfloat16"),
    "flash_attn": ATTENTION,
    "report_to": trackers,
    "disable_gradient_checkpointing": taken_later,
    "do_train": _train,
    "early_stopping_steps": number("train.stop_after", 1),
    "neftune_alpha": number("train.neftune_alpha", 1e-12, whole=False),
    "plot_loss": left("report.html has the curves"),
    "overwrite_cache": CACHE,
    "overwrite_output_dir": left("no folder is overwritten: the same command goes on with a run"),
    "preprocessing_num_workers": RUNTIME,
    "save_only_model": left("checkpoints hold what resuming needs"),
    "per_device_eval_batch_size": RUNTIME,
    "quantization_method": left("the base is packed by quant.calibrate"),
    "quantization_type": left("the grid here is integers (quant)"),
    "double_quantization": left("scales are bfloat16 here"),
}

LLAMA_FACTORY = Trainer("LLaMA-Factory", "model_name_or_path", RULES, _finish)
