"""The keys of LLaMA-Factory, and what each becomes here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .import_draft import Draft, Trainer
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
    if_true,
    left,
    number,
    on,
    refuse_stage,
    taken_later,
    targets,
    text,
    trackers,
    truth,
)


def _data(draft: Draft, key: str, value: Any) -> None:
    ours = "data.train" if key == "dataset" else "data.valid"
    names = (
        [part.strip() for part in value.split(",")]
        if isinstance(value, str)
        else [str(part) for part in value]
    )
    for name in names[1:]:
        draft.leave(key, f"{ours} is one source, so {name} is left; put the rows together in one file")
    entry, folder = _dataset_info(draft, names[0])
    if entry is None:
        draft.set(f"{ours}.path", names[0], f"{key}: {names[0]}")
        draft.set(f"{ours}.format", "alpaca", "their default")
        draft.leave(
            key, f"{names[0]} is not in a dataset_info.json beside this file: set {ours}.path and format"
        )
        return
    where = entry.get("file_name")
    draft.set(
        f"{ours}.path",
        str(folder / where) if where else str(entry.get("hf_hub_url")),
        f"{key}: {names[0]}, from dataset_info.json",
    )
    chat = entry.get("formatting") in ("sharegpt", "openai")
    draft.set(
        f"{ours}.format", "chat" if chat else "alpaca", f"formatting: {entry.get('formatting', 'alpaca')}"
    )
    for theirs, name in (("subset", "name"), ("split", "split")):
        if entry.get(theirs):
            draft.set(f"{ours}.{name}", str(entry[theirs]), f"{names[0]}.{theirs}")
    if entry.get("columns") or entry.get("tags"):
        draft.leave(
            key, f"{names[0]} names its columns: rows are read by the usual names of their fields here"
        )


def _dataset_info(draft: Draft, name: str) -> tuple[dict[str, Any] | None, Path]:
    """The entry of a data set in dataset_info.json, and the folder its files are named from."""
    given = Path(str(draft.theirs.get("dataset_dir") or "data"))
    for folder in (given, draft.folder / given, draft.folder):
        try:
            found = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8")).get(name)
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if isinstance(found, dict):
            return found, folder
    return None, given


def _stage(draft: Draft, key: str, value: Any) -> None:
    if value not in ("sft", "pt"):
        refuse_stage(draft, key, value)


def _type(draft: Draft, key: str, value: Any) -> None:
    if value != "lora":
        draft.leave(
            key,
            "full and frozen fine-tuning are not done here: an adapter (dl_qat) trains over the packed model",
        )


def _train(draft: Draft, key: str, value: Any) -> None:
    if truth(value) is not True:
        draft.leave(key, "a run always trains")


def _bits(draft: Draft, key: str, value: Any) -> None:
    if value in (2, 3, 4, 8):
        draft.set("quant.bits", value, key)
    else:
        draft.leave(key, "quant.bits is one of 2, 3, 4, 8")


def _finish(draft: Draft) -> None:
    theirs = draft.theirs
    if theirs.get("stage") == "pt":
        draft.set("data.train.format", "text", "stage: pt")
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
    "stage": _stage,
    "finetuning_type": _type,
    "quantization_bit": _bits,
    "lora_rank": number("adapter.rank", 1),
    "lora_target": targets,
    "adapter_name_or_path": text("adapter.init_from"),
    "use_rslora": taken_later,
    "use_dora": left("no DoRA here; dl_qat trains a magnitude per group"),
    "additional_target": left("embeddings and head stay as they are"),
    "dataset": _data,
    "eval_dataset": _data,
    "dataset_dir": taken_later,
    "template": left("the chat template of the model's own tokenizer is used"),
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
