"""`lowbit-ft init MODEL --memory 8`: the commented recipe, changed so that plan says it fits, with plan's
reason beside every key that had to change.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from ..names import HUB_ID
from ..plan.fixes import Planner, candidates, fit
from ..plan.plan import Plan, find_card
from ..recipe.layers import local_folder
from ..recipe.recipe import Recipe, load_recipe

# Of fixes that are no candidates: `fit` takes these by itself.
_OWN = {
    "quant.residual_bits": "of the rounding error, while training; fewer round small updates more coarsely",
    "train.keep_codes": "there is room: codes are made once per step",
}
_HEAD = "# Fitted to {gb:g} GB by `lowbit-ft plan`: {total:.2f} GB at the peak ({stage}), {before}.\n"


def config_folder(model_path: str, config: Path | None) -> Path:
    """A folder with the config.json of the model: the one that is given, the checkpoint, or the hub's (a few
    KB, fetched into its cache). ValueError when there is none."""
    if config is not None:
        return config
    if (folder := local_folder(model_path)) is not None:
        return folder
    if not HUB_ID.fullmatch(model_path) or "/" not in model_path:
        raise ValueError(
            f"model path: got {model_path!r}; there is no such folder; give a checkpoint folder or a hub id "
            "owner/name"
        )
    from huggingface_hub import (  # slow; only a hub id needs it
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    try:
        if isinstance(found := try_to_load_from_cache(model_path, "config.json"), str):
            return Path(found).parent
        get_hf_file_metadata(hf_hub_url(model_path, "config.json"))  # asks once; a download tries six times
        return Path(hf_hub_download(model_path, "config.json")).parent
    except Exception as error:  # OSError, ValueError or errors of the HTTP library: all for the user to solve
        detail = (str(error).strip().splitlines() or ["no detail"])[0]
        raise ValueError(
            f"{model_path}: its config.json could not be fetched ({type(error).__name__}: {detail}); give a "
            "folder that has it: --config FOLDER"
        ) from error


def fitted(text: str, memory_gb: float, folder: Path) -> str:
    """The recipe `text` as a card of that size allows it. ValueError when no change that is known does."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "recipe.yaml")
        path.write_text(text, encoding="utf-8")
        recipe = load_recipe(path, check=False, folders=())
    planner = Planner(recipe, folder, find_card(recipe, memory_gb))
    now = planner()
    if now is None:
        raise ValueError(f"{folder}: no plan can be made of its config.json; leave --memory out")
    chosen, made = fit(planner)
    for key, value, reason in _changes(recipe, chosen, planner):
        text = set_key(text, key, value, f"{memory_gb:g} GB: {reason}")
    return _head(text, memory_gb, now, made)


def _head(text: str, memory_gb: float, now: Plan, made: Plan) -> str:
    """The line that says what it was fitted to, below the comment at the top."""
    before = f"{now.total / 1e9:.2f} GB before" if now.total > made.total else "as it was"
    line = _HEAD.format(gb=memory_gb, total=made.total / 1e9, stage=made.stage, before=before)
    first = text.index("\nname:")
    return text[:first] + line + text[first:]


def _changes(recipe: Recipe, chosen: Recipe, planner: Planner) -> list[tuple[str, Any, str]]:
    """(key, new value, why) of every key that `fit` changed."""
    before, after = recipe.model_dump(mode="json"), chosen.model_dump(mode="json")
    changed = {
        f"{section}.{key}": value
        for section, values in after.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if before[section].get(key) != value
    }
    reasons = {
        key: cost
        for changes, cost, _ in candidates(recipe, planner.card.arch > 0)
        for key, value in changes.items()
        if changed.get(key) == value
    }
    return [(key, value, {**reasons, **_OWN}.get(key, "so that it fits")) for key, value in changed.items()]


def set_key(text: str, key: str, value: Any, why: str) -> str:
    """Set `section.key` in the text of a recipe of ours, where it stands or is commented out; `why` takes the
    place of its comment."""
    section, _, name = key.partition(".")
    first = text.index(f"\n{section}:\n") + 1
    last = next((m.start() for m in re.finditer(r"\n\n", text[first:])), len(text) - first) + first
    shown = str(value).lower() if isinstance(value, bool) or value is None else str(value)
    line = f"{f'  {name}: {shown}':<36} # {why}"
    pattern = re.compile(rf"^  (?:# )?{name}:.*$", re.MULTILINE)
    part, count = pattern.subn(lambda _: line, text[first:last], count=1)
    assert count == 1, f"{key}: not in the template"
    return text[:first] + part + text[last:]
