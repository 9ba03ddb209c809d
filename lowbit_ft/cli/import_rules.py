"""The rules that another trainer's keys are made of, and the keys that trainers share because they hand them
to transformers' own trainer.

A rule is a function (draft, key, value) that sets a key of ours or leaves theirs with a reason; `finish` does
what needs several keys at once. The adapter becomes `dl_qat`: like a LoRA it counts units of the weight, so
rank, alpha and learning rate keep their meaning.
"""

from __future__ import annotations

import math
from typing import Any

from ..recipe.yaml import RecipeError
from ..train.optimizers import OPTIMIZERS
from .import_draft import Draft, Rule

SCHEDULERS = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}
OPTIMIZER_NAMES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw8bit",
    "adamw_8bit": "adamw8bit",
    "paged_adamw_8bit": "paged_adamw8bit",
    "paged_adamw_32bit": "paged_adamw32bit",
    "lion_8bit": "lion8bit",
    "lion_32bit": "lion32bit",
    "paged_lion_8bit": "paged_lion8bit",
    "paged_lion_32bit": "paged_lion32bit",
    "ademamix": "ademamix",
    "ademamix_8bit": "ademamix8bit",
}


def number(ours: str, least: float = 0.0, whole: bool = True) -> Rule:
    """The number as it is; left when it is below `least` (0 and -1 often mean "off")."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if isinstance(value, bool):
            raise ValueError("a number is needed")
        read = float(value)
        if read < least or not math.isfinite(read):
            draft.leave(key, f"{ours} is at least {least:g}")
        elif whole and read != int(read):
            draft.leave(key, f"{ours} is a whole number")
        else:
            draft.set(ours, int(read) if whole else read, key)

    return rule


def text(ours: str) -> Rule:
    def rule(draft: Draft, key: str, value: Any) -> None:
        if not isinstance(value, str) or not value:
            raise ValueError("text is needed")
        draft.set(ours, value, key)

    return rule


def truth(value: Any) -> bool | None:
    """True or False, also where it is written as a word or as 1 and 0; None for anything else."""
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())


def flag(ours: str, *on: str) -> Rule:
    """on: words of theirs that mean true."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        read = True if value in on else truth(value)
        if read is None:
            raise ValueError("true or false is needed")
        draft.set(ours, read, key if isinstance(value, bool) else f"{key}: {value}")

    return rule


def chosen(ours: str, table: dict[str, str]) -> Rule:
    def rule(draft: Draft, key: str, value: Any) -> None:
        if str(value) in table:
            draft.set(ours, table[str(value)], f"{key}: {value}")
        else:
            draft.leave(key, f"{ours} has no such choice; known: {', '.join(table)}")

    return rule


def left(why: str) -> Rule:
    """Not taken over; nothing to tell where it is off."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if value is not False and value != 0 and value not in ({}, [], "none", "no"):
            draft.leave(key, why)

    return rule


def taken_later(draft: Draft, key: str, value: Any) -> None:
    """A trainer's `finish`, or the rule of `dataset`, looks at it with others."""


def if_true(ours: str, value: Any) -> Rule:
    def rule(draft: Draft, key: str, given: Any) -> None:
        read = True if given in ("auto", "full") else truth(given)
        if read is None:
            raise ValueError("true or false is needed")
        if read:
            draft.set(ours, value, f"{key}: {given}")

    return rule


def if_not_off(rule: Rule) -> Rule:
    def checked(draft: Draft, key: str, value: Any) -> None:
        if value:
            rule(draft, key, value)

    return checked


def targets(draft: Draft, key: str, value: Any) -> None:
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if names in (["all"], ["all-linear"]) or not names:
        return  # every packed layer, our default
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("a list of names is needed")
    draft.set("adapter.targets", names, key)


def names_of(value: Any) -> list[str]:
    """A list of words, or words between commas."""
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError("a list of names is needed")
    return names


def modules(draft: Draft, key: str, value: Any) -> None:
    draft.set("adapter.modules_to_save", names_of(value), key)


def new_tokens(special: bool) -> Rule:
    """Tokens that are added; all of a recipe are special, or none."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if draft.get("model.add_tokens.tokens"):
            draft.leave(key, "new tokens are all special here, or none: add them to model.add_tokens.tokens")
            return
        draft.set("model.add_tokens.tokens", names_of(value), key)
        draft.set("model.add_tokens.special", special, key)

    return rule


def trackers(draft: Draft, key: str, value: Any) -> None:
    names = [value] if isinstance(value, str) else list(value)
    known = [name for name in names if name in ("wandb", "tensorboard", "trackio")]
    if known:
        draft.set("train.trackers", known, key)
    if others := [name for name in names if name not in known and name != "none"]:
        draft.leave(
            key,
            f"no tracker {', '.join(map(str, others))} here; metrics.jsonl and "
            "report.html are always written",
        )


def refuse_reward(draft: Draft, key: str, value: Any) -> None:
    raise RecipeError([f"{key}: got {value!r}; no reward model is trained here; nothing was written"])


RUNTIME = left("how it is run, not what is trained: see the README (torchrun for several GPUs)")
CACHE = left("prepared rows are kept and checked without being asked")
NO_DROPOUT = left("only lora has a side path to drop inputs of: adapter.dropout")
NO_SPLIT = left("rows are not split here: give a file of its own as data.valid")
ATTENTION = left(
    "torch's own attention (sdpa) is used; set model.attention: flash_attention_2 where "
    "flash-attn is installed"
)
SHARED: dict[str, Rule] = {
    "gradient_accumulation_steps": number("train.gradient_accumulation_steps", 1),
    "learning_rate": number("train.learning_rate", 1e-12, whole=False),
    "weight_decay": number("train.weight_decay", whole=False),
    "adam_epsilon": number("train.eps", 1e-30, whole=False),
    "max_grad_norm": number("train.max_grad_norm", 1e-9, whole=False),
    "warmup_ratio": number("train.warmup_ratio", whole=False),
    "logging_steps": number("train.log_every", 1),
    "save_steps": number("train.save_every", 1),
    "eval_steps": number("train.eval_every", 1),
    "save_total_limit": number("train.keep_checkpoints", 1),
    "seed": number("train.seed"),
    "gradient_checkpointing": flag(
        "train.gradient_checkpointing", "unsloth", "offload", "offload_disk", "auto"
    ),
    "output_dir": text("output"),
    "bf16": if_true("model.dtype", "bfloat16"),
    "fp16": if_true("model.dtype", "float16"),
    "load_best_model_at_end": if_true("train.keep_best", True),
    "use_tensorboard": if_true("train.trackers", ["tensorboard"]),
    "adam_beta1": taken_later,
    "adam_beta2": taken_later,
    "warmup_steps": taken_later,
    "max_steps": taken_later,
    "lora_alpha": taken_later,
    "lora_dropout": NO_DROPOUT,
    "eval_strategy": taken_later,
    "evaluation_strategy": taken_later,
    "trust_remote_code": left("code of a checkpoint is never run here"),
    "deepspeed": RUNTIME,
    "fsdp": RUNTIME,
    "fsdp_config": RUNTIME,
    "ddp_timeout": RUNTIME,
    "local_rank": RUNTIME,
    "dataloader_num_workers": RUNTIME,
    "resume_from_checkpoint": left("the same command resumes a run by itself"),
    "neftune_noise_alpha": number("train.neftune_alpha", 1e-12, whole=False),
    "loraplus_lr_ratio": left("A and B share one rate; scales have train.scale_learning_rate"),
    "tf32": left("not used: the codes are made in full fp32"),
    "val_size": NO_SPLIT,
    "val_set_size": NO_SPLIT,
}


def finish(
    draft: Draft, everything: bool, *, rank_key: str, rslora: bool, epochs: float, epochs_key: str
) -> None:
    """The keys that depend on each other: method and alpha, length, warm-up, betas, which tokens learn."""
    theirs = draft.theirs
    draft.values = {"adapter.method": ("dl_qat", "a LoRA, inside the integers")} | draft.values
    if "quant.bits" not in draft.values and not theirs.get("gptq"):
        draft.set("quant.bits", 4, "no key of theirs")
    rank = draft.get("adapter.rank", 16)
    alpha = number_at(draft, "lora_alpha")
    if alpha is not None and alpha > 0:
        scaled = next((key for key in ("peft_use_rslora", "use_rslora") if key in theirs), "")
        source = "lora_alpha" if not rslora else f"lora_alpha x sqrt({rank_key}), for {scaled}"
        draft.set("adapter.alpha", alpha * (math.sqrt(rank) if rslora else 1.0), source)

    _finish_modules(draft)
    steps = number_at(draft, "max_steps")
    given_epochs = number_at(draft, epochs_key)
    if steps is not None and steps >= 1:
        draft.set("train.max_steps", int(steps), "max_steps")
        if given_epochs is not None:
            draft.leave(epochs_key, "max_steps says how long")
    elif given_epochs is not None and given_epochs > 0:
        draft.set("train.epochs", given_epochs, epochs_key)
    else:
        draft.set("train.epochs", epochs, "their default")
    warmup = number_at(draft, "warmup_steps")
    if warmup:
        if "train.max_steps" in draft.values:
            draft.set(
                "train.warmup_ratio",
                round(min(1.0, warmup / draft.get("train.max_steps")), 6),
                "warmup_steps / max_steps",
            )
        else:
            draft.leave(
                "warmup_steps",
                "a share of the steps here, whose number is not in the file: set train.warmup_ratio",
            )
    betas = [number_at(draft, key) for key in ("adam_beta1", "adam_beta2")]
    if any(beta is not None for beta in betas):
        draft.set(
            "train.betas",
            [0.9 if betas[0] is None else betas[0], 0.999 if betas[1] is None else betas[1]],
            "adam_beta1, adam_beta2",
        )
    strategy_key = next(
        (key for key in ("eval_strategy", "evaluation_strategy") if theirs.get(key) is not None),
        "eval_strategy",
    )
    strategy = theirs.get(strategy_key)
    if strategy not in (None, "steps"):
        draft.values.pop("train.eval_every", None)
        if strategy is not False and strategy != "no":
            draft.leave(strategy_key, "counted in steps here: set train.eval_every")
        elif theirs.get("eval_steps") is not None:
            draft.leave("eval_steps", f"{strategy_key} is no")
    elif strategy == "steps" and theirs.get("eval_steps") is None:
        draft.leave(strategy_key, "eval_steps is not in the file: set train.eval_every")
    if draft.get("train.eval_every") and not draft.sources("data.valid"):
        draft.values.pop("train.eval_every")
        draft.leave("eval_steps", "there is no data.valid to measure on")
    if draft.get("train.stop_after"):
        key = draft.values["train.stop_after"][1]
        if draft.get("train.eval_every"):
            draft.set("train.keep_best", True, f"{key}: the best is kept")
        else:
            draft.values.pop("train.stop_after")
            draft.leave(key, "nothing is evaluated while training: set data.valid and train.eval_every")
    _finish_rows(draft, everything)


def _finish_modules(draft: Draft) -> None:
    """What trains beside the adapters learns at their rate in the file."""
    beside = ("adapter.modules_to_save", "model.add_tokens.tokens")
    if not any(draft.get(ours) for ours in beside):
        if "train.modules_learning_rate" in draft.values:
            _, key = draft.values.pop("train.modules_learning_rate")
            draft.leave(key, "nothing trains beside the adapters")
    elif "train.modules_learning_rate" not in draft.values and (rate := draft.get("train.learning_rate")):
        draft.set("train.modules_learning_rate", rate, "learning_rate: one for all in the file")


def _finish_rows(draft: Draft, everything: bool) -> None:
    """What is learned of the sources, and whether they share windows."""
    if "data.train_on" not in draft.values:
        formats = {draft.get(f"{place}.format") for place in draft.sources("data.train")}
        learned = (
            "completion"
            if "preference" in formats
            else "all"
            if everything or formats == {"text"}
            else "assistant"
            if "chat" in formats
            else "completion"
        )
        draft.set("data.train_on", learned, "every token" if learned == "all" else "answers only")
    if not draft.sources("data.train"):
        draft.leave("dataset", "no training rows in the file: set data.train")
    for ours in ("data.train", "data.valid"):
        formats = [draft.get(f"{place}.format") for place in draft.sources(ours)]
        if "text" in formats and set(formats) != {"text"}:
            if draft.get("data.packing"):
                draft.leave(draft.values["data.packing"][1], "texts and other rows do not share windows here")
            draft.set("data.packing", False, "texts beside rows of another format are not packed")


def number_at(draft: Draft, key: str) -> float | None:
    """The number at a key of theirs; None where there is none, and the key is left where it is something
    else.
    """
    value = draft.theirs.get(key)
    if value is None:
        return None
    try:
        read = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        read = math.nan
    if math.isfinite(read):
        return read
    draft.leave(key, "not readable as what it should be (a number is needed)")
    return None


def on(draft: Draft, key: str) -> bool:
    """Whether a key of theirs is true; it is left where it is neither true nor false."""
    value = draft.theirs.get(key)
    read = False if value is None else truth(value)
    if read is None and key not in dict(draft.left):
        draft.leave(key, "not readable as what it should be (true or false is needed)")
    return bool(read)


assert set(OPTIMIZER_NAMES.values()) <= set(OPTIMIZERS), "an optimizer that train.optimizer does not have"
