"""The data sets of other trainers' files: what of their entries the readers of data/ do, and what is left.

The tables name the values that mean what is done here anyway; any other value is left with its reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.columns import LEARN_KEYS, THOUGHT_KEYS
from ..data.formats import FORMATS
from ..files.jsonfile import read_json
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
}
_AXOLOTL_WHY = {
    "roles_to_train": "the assistant's turns are learned, and a turn of another role that says train: true",
    "message_field_training_detail": "a turn is learned whole or not at all",
    "train_on_eos": "the end of every learned turn is learned",
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
    """datasets, test_datasets."""
    ours = "data.train" if key == "datasets" else "data.valid"
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        raise ValueError("a list of data sets is needed")
    for i in range(1, len(value)):
        draft.leave(f"{key}.{i}", f"{ours} is one source; put the rows together in one file")
    first = value[0]
    _axolotl_path(draft, f"{key}.0", ours, first)
    kind, _, style = str(first.get("type", "")).replace(":", ".").partition(".")
    if kind in AXOLOTL_FORMATS:
        draft.set(f"{ours}.format", AXOLOTL_FORMATS[kind], f"{key}.0.type: {kind}")
        if kind == "alpaca" and style:
            draft.leave(
                f"{key}.0.type", "format: alpaca writes Stanford Alpaca's own prompt, no other style of it"
            )
    else:
        draft.set(f"{ours}.format", "chat", "a guess")
        draft.leave(f"{key}.0.type", f"no such format here ({', '.join(FORMATS)}); {ours}.format is a guess")
    _split(draft, f"{key}.0.split", ours, first.get("split"))
    for name in ("name", "revision"):
        if first.get(name):
            draft.set(f"{ours}.{name}", str(first[name]), f"{key}.0.{name}")
    for name, given in first.items():
        read = name in ("path", "type", "data_files", "split", "name", "revision")
        if not read and given is not None and given not in _AXOLOTL_USUAL.get(name, ()):
            why = _AXOLOTL_WHY.get(name, "rows are read by the usual names of their fields")
            draft.leave(f"{key}.0.{name}", why)


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
    format = "chat" if chat else "alpaca"
    draft.set(f"{ours}.format", format, f"formatting: {entry.get('formatting', 'alpaca')}")
    if not chat and draft.theirs.get("stage") != "pt":
        draft.leave(
            key,
            f"{names[0]}: format: alpaca writes Stanford Alpaca's prompt, theirs the chat template; for "
            "that make the rows messages (format: chat)",
        )
    if entry.get("subset"):
        draft.set(f"{ours}.name", str(entry["subset"]), f"{names[0]}.subset")
    _split(draft, f"{names[0]}.split", ours, entry.get("split"))
    for part, usual in (("columns", _COLUMNS_USUAL[format]), ("tags", _TAGS_USUAL)):
        given = entry.get(part)
        if not given:
            continue
        other = (
            given
            if not isinstance(given, dict)
            else [k for k, v in given.items() if v not in usual.get(k, ())]
        )
        if other:
            draft.leave(
                key,
                f"{names[0]} names its {part} ({', '.join(map(str, other))}): the usual ones are read",
            )
    if rest := [
        name for name, said in entry.items() if name not in _ENTRY_READ and said not in (None, False)
    ]:
        draft.leave(key, f"{names[0]}: no key here does what its {', '.join(rest)} does")


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
