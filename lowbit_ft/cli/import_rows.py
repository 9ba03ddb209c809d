"""The data sets of other trainers' files: what of their entries the readers of data/ do, and what is left.

The tables name the values that mean what is done here anyway; any other value is left with its reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.columns import LEARN_KEYS, THOUGHT_KEYS
from ..data.formats import FORMATS
from ..files.jsonfile import read_json
from .import_chat import AXOLOTL_RL, axolotl_pairs, factory_pairs
from .import_draft import Draft

AXOLOTL_FORMATS = {
    "alpaca": "alpaca",
    "chat_template": "chat",
    "sharegpt": "chat",
    "completion": "text",
    "pretrain": "text",
}
_BUILDERS = ("json", "parquet", "csv", "text")  # a path of theirs that says how data_files are read
_AXOLOTL_USUAL: dict[str, tuple[object, ...]] = {
    "field_messages": ("messages", "conversations"),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
    "message_field_training": LEARN_KEYS,
    "field_system": ("system",),
    "field_tools": ("tools",),
    "field_thinking": THOUGHT_KEYS,
    "field": ("text",),
    "ds_type": _BUILDERS,
    "train_on_eos": ("turn",),
    "chat_template": ("tokenizer_default",),
}
_AXOLOTL_WHY = {
    "roles_to_train": "the assistant's turns are learned, and a turn of another role that says train: true",
    "message_field_training_detail": "a turn is learned whole or not at all",
    "train_on_eos": "the end of every learned turn is learned",
    "chat_template": "one template for all rows: data.chat_template",
    "chat_template_jinja": "one template for all rows: data.chat_template",
}
_COLUMNS_USUAL = {  # LLaMA-Factory's name of a column -> ours
    "alpaca": {
        "prompt": ("instruction",),
        "query": ("input",),
        "response": ("output",),
        "system": ("system",),
        "history": ("history",),
    },
    "chat": {"messages": ("messages", "conversations"), "system": ("system",), "tools": ("tools",)},
}
_TAGS_USUAL = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}
_ENTRY_READ = ("file_name", "hf_hub_url", "formatting", "subset", "split", "columns", "tags")


def axolotl_rows(draft: Draft, key: str, value: Any) -> None:
    """datasets, test_datasets: one source, or a list without weights, as Axolotl puts them together."""
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise ValueError("a list of data sets is needed")
    ours = _places("data.train" if key == "datasets" else "data.valid", len(value))
    for i, (place, entry) in enumerate(zip(ours, value, strict=True)):
        _axolotl_entry(draft, f"{key}.{i}", place, entry)


def _places(ours: str, count: int) -> list[str]:
    """The keys of so many sources."""
    return [ours] if count == 1 else [f"{ours}.{i}" for i in range(count)]


def _axolotl_entry(draft: Draft, key: str, ours: str, entry: dict[str, Any]) -> None:
    _axolotl_path(draft, key, ours, entry)
    kind, _, style = str(entry.get("type", "")).replace(":", ".").partition(".")
    if str(draft.theirs.get("rl")) in AXOLOTL_RL:
        axolotl_pairs(draft, f"{key}.type", ours, kind, style)
    elif kind in AXOLOTL_FORMATS:
        draft.set(f"{ours}.format", AXOLOTL_FORMATS[kind], f"{key}.type: {kind}")
        if kind == "alpaca" and style:
            draft.leave(
                f"{key}.type", "format: alpaca writes Stanford Alpaca's own prompt, no other style of it"
            )
    else:
        draft.set(f"{ours}.format", "chat", "a guess")
        draft.leave(f"{key}.type", f"no such format here ({', '.join(FORMATS)}); {ours}.format is a guess")
    _split(draft, f"{key}.split", ours, entry.get("split"))
    for name in ("name", "revision"):
        if entry.get(name):
            draft.set(f"{ours}.{name}", str(entry[name]), f"{key}.{name}")
    for name, given in entry.items():
        read = name in ("path", "type", "data_files", "split", "name", "revision")
        if not read and given is not None and given not in _AXOLOTL_USUAL.get(name, ()):
            why = _AXOLOTL_WHY.get(name, "rows are read by the usual names of their fields")
            draft.leave(f"{key}.{name}", why)


def _axolotl_path(draft: Draft, key: str, ours: str, first: dict[str, Any]) -> None:
    """path, and data_files: local files under the name of a builder, else files of what path names."""
    path, files = first.get("path"), first.get("data_files")
    names = [files] if isinstance(files, str) else files if isinstance(files, list) else []
    if not names:
        draft.set(f"{ours}.path", str(path), f"{key}.path")
        return
    if path is None or path in _BUILDERS:
        draft.set(f"{ours}.path", str(names[0]), f"{key}.data_files")
    elif Path(str(path)).expanduser().is_dir():
        draft.set(f"{ours}.path", str(Path(str(path)) / str(names[0])), f"{key}.path and data_files")
    else:
        draft.set(f"{ours}.path", str(path), f"{key}.path")
        draft.leave(
            f"{key}.data_files", "single files of a hub data set are not named here: set split or name"
        )
        return
    if len(names) > 1:
        draft.leave(
            f"{key}.data_files", f"{ours}.path is one path: all but the first are left; use a pattern"
        )


def _split(draft: Draft, key: str, ours: str, split: Any) -> None:
    if split and any(mark in str(split) for mark in "[+"):
        draft.leave(key, "no slice of a split here: use limit, or a file of its own")
    elif split:
        draft.set(f"{ours}.split", str(split), key)


def factory_rows(draft: Draft, key: str, value: Any) -> None:
    """dataset, eval_dataset: names of entries in dataset_info.json."""
    given = value.split(",") if isinstance(value, str) else value
    names = [name for part in given if (name := str(part).strip())]
    ours = _places("data.train" if key == "dataset" else "data.valid", len(names))
    for place, name in zip(ours, names, strict=True):
        _factory_entry(draft, key, place, name)


def factory_mixture(draft: Draft) -> None:
    """mix_strategy and interleave_probs, which count where there are several data sets."""
    places, theirs = draft.sources("data.train"), draft.theirs
    how, odds = str(theirs.get("mix_strategy") or "concat"), theirs.get("interleave_probs")
    strategy = {"interleave_under": "first_exhausted", "interleave_over": "all_exhausted"}.get(how)
    if len(places) < 2:
        return
    if strategy is None:
        if how not in ("concat", "interleave_once"):
            draft.leave("mix_strategy", "allowed: concat, interleave_under, interleave_over, interleave_once")
        if odds is not None:
            draft.leave("interleave_probs", f"with mix_strategy: {how} every row stands in an epoch once")
        return
    try:
        parts = odds.split(",") if isinstance(odds, str) else [1] * len(places) if odds is None else odds
        weights = [float(part) for part in parts]
    except (TypeError, ValueError):
        weights = []
    if len(weights) != len(places) or not all(0 < weight < float("inf") for weight in weights):
        draft.leave("interleave_probs", f"a number above 0 for each of {len(places)} data sets is needed")
        return
    for place, weight in zip(places, weights, strict=True):
        draft.set(
            f"{place}.weight", weight, "interleave_probs" if odds is not None else f"mix_strategy: {how}"
        )
    draft.set("data.stopping_strategy", strategy, f"mix_strategy: {how}")


def _factory_entry(draft: Draft, key: str, ours: str, name: str) -> None:
    entry, folder = _dataset_info(draft, name)
    if entry is None:
        draft.set(f"{ours}.path", name, f"{key}: {name}")
        draft.set(f"{ours}.format", "alpaca", "their default")
        draft.leave(key, f"{name} is not in a dataset_info.json beside this file: set {ours}.path and format")
        return
    where = entry.get("file_name")
    draft.set(
        f"{ours}.path",
        str(folder / where) if where else str(entry.get("hf_hub_url")),
        f"{key}: {name}, from dataset_info.json",
    )
    chat = entry.get("formatting") in ("sharegpt", "openai")
    format = "chat" if chat else "alpaca"
    draft.set(f"{ours}.format", format, f"formatting: {entry.get('formatting', 'alpaca')}")
    pairs = draft.theirs.get("stage") == "dpo"
    if pairs:
        factory_pairs(draft, key, ours, name, entry)
    elif not chat and draft.theirs.get("stage") != "pt":
        draft.leave(
            key,
            f"{name}: format: alpaca writes Stanford Alpaca's prompt, theirs the chat template; for "
            "that make the rows messages (format: chat)",
        )
    if entry.get("subset"):
        draft.set(f"{ours}.name", str(entry["subset"]), f"{name}.subset")
    _split(draft, f"{name}.split", ours, entry.get("split"))
    for part, usual in (("columns", _COLUMNS_USUAL[format]), ("tags", _TAGS_USUAL)):
        given = entry.get(part)
        if not given or pairs:
            continue
        other = (
            given
            if not isinstance(given, dict)
            else [k for k, v in given.items() if v not in usual.get(k, ())]
        )
        if other:
            draft.leave(
                key,
                f"{name} names its {part} ({', '.join(map(str, other))}): the usual ones are read",
            )
    if rest := [
        part
        for part, said in entry.items()
        if part not in (*_ENTRY_READ, *(["ranking"] if pairs else [])) and said not in (None, False)
    ]:
        draft.leave(key, f"{name}: no key here does what its {', '.join(rest)} does")


def _dataset_info(draft: Draft, name: str) -> tuple[dict[str, Any] | None, Path]:
    """The entry of a data set in dataset_info.json, and the folder its files are named from."""
    given = Path(str(draft.theirs.get("dataset_dir") or "data"))
    for folder in (given, draft.folder / given, draft.folder):
        try:
            found = read_json(folder / "dataset_info.json", dict[str, Any]).get(name)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found, folder
    return None, given
