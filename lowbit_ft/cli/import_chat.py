"""Chat templates and preferences in other trainers' files: what means the same here, and what does not.

A named template of theirs is a copy that their library carries; only ChatML is the same everywhere, so any
other name is left, and the template of the model's own tokenizer is used. Losses are compared by their
formulas: where both sides compute TRL's, the name is taken over, and where ours differs or there is none, the
key is left with the reason, or the file is refused when nothing of its objective would be trained.
"""

from __future__ import annotations

from typing import Any

from ..recipe.yaml import RecipeError
from .import_draft import Draft
from .import_rules import number_at, truth

_THEIR_COPY = (
    "their own copy of a template; that of the model's tokenizer is used: for another set data.chat_template "
    "(a file, or a model that has it)"
)
_ELSEWHERE = "other objectives are TRL's, over LowBitConfig (docs/preference.md); nothing was written"
# An objective of theirs -> train.signal.kind and loss_type.
AXOLOTL_RL = {"dpo": ("dpo", "sigmoid"), "ipo": ("dpo", "ipo"), "orpo": ("orpo", None)}
FACTORY_LOSSES = {
    "sigmoid": ("dpo", "sigmoid"),
    "hinge": ("dpo", "hinge"),
    "ipo": ("dpo", "ipo"),
    "orpo": ("orpo", None),
}


# ------------------------------------------------------------------------------------------------- templates


def template_kwargs(draft: Draft, key: str, value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError("names with values are needed")
    if value:
        draft.set("data.chat_template_kwargs", value, key)


def axolotl_template(draft: Draft) -> None:
    """chat_template, and chat_template_jinja, which counts where that one is jinja or left out."""
    theirs = draft.theirs
    name, text = theirs.get("chat_template"), theirs.get("chat_template_jinja")
    if text is not None and name not in (None, "jinja"):
        draft.leave("chat_template_jinja", f"chat_template: {name} says which")
    elif isinstance(text, str) and text:
        draft.set("data.chat_template", text, "chat_template_jinja")
    elif text is not None or name == "jinja":
        draft.leave("chat_template", "chat_template_jinja, the text or a file, is not in it")
    elif name == "chatml":
        draft.set("data.chat_template", "chatml", "chat_template: chatml")
    elif isinstance(name, str) and name.startswith("tokenizer_default_fallback_"):
        draft.leave(
            "chat_template",
            "the template of the model's tokenizer is used; where it has none, set data.chat_template",
        )
    elif name not in (None, "tokenizer_default"):
        draft.leave("chat_template", _THEIR_COPY)


def factory_template(draft: Draft, key: str, value: Any) -> None:
    if value == "chatml":
        draft.set("data.chat_template", "chatml", f"{key}: chatml")
    else:
        draft.leave(key, _THEIR_COPY)


def factory_thinking(draft: Draft, key: str, value: Any) -> None:
    """False is what the templates of such models make of it; true also changes answers without thoughts."""
    if truth(value) is False:
        draft.set("data.chat_template_kwargs", {"enable_thinking": False}, f"{key}: {value}")
    else:
        draft.leave(
            key, "theirs puts empty thoughts into answers that have none; here answers are as the rows say"
        )


# ----------------------------------------------------------------------------------------------- preferences


def axolotl_rl(draft: Draft, key: str, value: Any) -> None:
    if value not in AXOLOTL_RL:
        allowed = ", ".join(AXOLOTL_RL)
        raise RecipeError([f"{key}: got {value!r}; allowed: {allowed}, or none; {_ELSEWHERE}"])
    _signal(draft, f"{key}: {value}", *AXOLOTL_RL[value])


def factory_stage(draft: Draft, key: str, value: Any) -> None:
    if value not in ("sft", "pt", "dpo"):
        raise RecipeError([f"{key}: got {value!r}; allowed: sft, pt, dpo; {_ELSEWHERE}"])


def factory_loss(draft: Draft) -> None:
    """stage: dpo with pref_loss, and the keys that go with it."""
    theirs = draft.theirs
    loss = theirs.get("pref_loss")
    if theirs.get("stage") != "dpo":
        for key in ("pref_loss", "pref_beta", "pref_ftx"):
            if theirs.get(key) is not None:
                draft.leave(key, "of stage: dpo, which this file is not")
        return
    if loss is not None and loss not in FACTORY_LOSSES:
        allowed = ", ".join(FACTORY_LOSSES)
        raise RecipeError([f"pref_loss: got {loss!r}; allowed: {allowed}; {_ELSEWHERE}"])
    source = "stage: dpo" if loss is None else f"pref_loss: {loss}"
    _signal(draft, source, *FACTORY_LOSSES[loss or "sigmoid"])
    _beta(draft, ["pref_beta"])
    if number_at(draft, "pref_ftx"):
        draft.leave("pref_ftx", "no cross entropy beside DPO here; signal.kind: orpo has one")


def axolotl_beta(draft: Draft) -> None:
    """The first of Axolotl's keys for one number, in its own order; the others are left."""
    trl = draft.theirs.get("trl")
    if isinstance(trl, dict):
        for name, value in trl.items():
            if name != "beta" and value is not None:
                draft.leave(f"trl.{name}", "of trainers that stay TRL's, over LowBitConfig")
    elif trl is not None:
        draft.leave("trl", "not readable as what it should be (names with values are needed)")
    keys = ["rl_beta", "orpo_alpha", "dpo_beta"]
    if isinstance(trl, dict) and trl.get("beta") is not None:
        draft.theirs = draft.theirs | {"trl.beta": trl["beta"]}
        keys.insert(0, "trl.beta")
    _beta(draft, keys)


def _beta(draft: Draft, keys: list[str]) -> None:
    said = [key for key in keys if draft.theirs.get(key) is not None]
    for place, key in enumerate(said):
        if "train.signal.kind" not in draft.values:
            draft.leave(key, "of preferences, which this file does not train on")
        elif place:
            draft.leave(key, f"{said[0]} says it")
        elif (beta := number_at(draft, key)) is not None and beta > 0:
            draft.set("train.signal.beta", beta, key)
        elif beta is not None:
            draft.leave(key, "train.signal.beta is above 0")


def _signal(draft: Draft, source: str, kind: str, loss_type: str | None) -> None:
    draft.set("train.signal.kind", kind, source)
    if loss_type not in (None, "sigmoid"):
        draft.set("train.signal.loss_type", loss_type, source)


# Axolotl's types of preference rows that have the columns of format: preference.
_AXOLOTL_PAIRS = ("passthrough", "ultra", "argilla_chat")
_AXOLOTL_ORPO = ("argilla",)  # under rl: orpo with type: chat_template.argilla


def axolotl_pairs(draft: Draft, key: str, ours: str, kind: str, style: str) -> None:
    """The type of a data set of preferences."""
    draft.set(f"{ours}.format", "preference", f"rl: {draft.theirs.get('rl')}")
    same = {kind, style} & set(_AXOLOTL_PAIRS)
    if not same and not (draft.theirs.get("rl") == "orpo" and style in _AXOLOTL_ORPO):
        draft.leave(
            key, "format: preference reads the columns prompt, chosen and rejected: name them so in the rows"
        )


def factory_pairs(draft: Draft, key: str, ours: str, name: str, entry: dict[str, Any]) -> None:
    """An entry of dataset_info.json under stage: dpo."""
    draft.set(f"{ours}.format", "preference", "stage: dpo")
    columns = entry.get("columns") if isinstance(entry.get("columns"), dict) else {}
    same = columns == {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    if not entry.get("ranking"):
        draft.leave(key, f"{name} is no data set of rankings")
    elif entry.get("formatting") in ("sharegpt", "openai") or not same:
        draft.leave(
            key,
            f"{name}: format: preference reads the columns prompt, chosen and rejected, text or lists of "
            "turns (role, content): name them so in the rows",
        )
    else:
        draft.leave(key, f"{name}: theirs puts plain text into the template; here turns go there, text stays")
