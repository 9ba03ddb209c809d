"""`lowbit-ft import-recipe`: a recipe from another trainer's YAML, and a list of what it could not take over.

The trainers are in TRAINERS, a file each; their YAML is told apart by the key that names the model. Each key
of theirs has a rule there: it sets a key of ours, or is left with a reason; a key without a rule is left too,
so nothing disappears in silence. The file is read as recipes are (safe YAML, with its size and its aliases
bounded), and nothing in it is run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..files.atomic import write_text
from ..names import did_you_mean
from ..recipe.errors import shown
from ..recipe.yaml import RecipeError, read_source
from .import_axolotl import AXOLOTL
from .import_draft import Draft, Trainer
from .import_llamafactory import LLAMA_FACTORY
from .places import refuse_existing

TRAINERS: dict[str, Trainer] = {"axolotl": AXOLOTL, "llama_factory": LLAMA_FACTORY}
SECTIONS = ("model", "quant", "adapter", "data", "train", "eval", "export")


def import_recipe(path: Path) -> Draft:
    """Read another trainer's YAML. RecipeError (a ValueError) when it is no YAML, or of neither trainer, or
    of a stage that is not supervised fine-tuning.
    """
    source = read_source(path)
    if source.problems:
        raise RecipeError(source.problems)
    found = [trainer for trainer in TRAINERS.values() if trainer.model_key in source.values]
    if len(found) != 1:
        keys = " or ".join(f"{trainer.model_key} ({trainer.name})" for trainer in TRAINERS.values())
        got = (
            "a recipe of ours"
            if {"model", "train"} <= source.values.keys()
            else f"the keys {', '.join(list(source.values)[:6]) or 'none'}"
        )
        models = [trainer.model_key for trainer in TRAINERS.values()]
        hint = next((told for key in source.values if not found and (told := did_you_mean(key, models))), "")
        raise RecipeError([f"{path}: got {got}; allowed: a file with {keys}, one of them{hint}"])
    trainer = found[0]
    draft = Draft(trainer.name, source.values, path.resolve().parent)
    for key, value in source.values.items():
        rule = trainer.rules.get(key)
        if value is None:
            continue  # an empty key says nothing
        if rule is None:
            draft.leave(key, "no key here does this")
            continue
        try:
            rule(draft, key, value)
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, RecipeError):
                raise RecipeError(
                    [f"{source.place((key,))}: {problem}" for problem in error.problems]
                ) from None
            draft.leave(key, f"not readable as what it should be ({error})")
    if "model.path" not in draft.values:
        raise RecipeError(
            [
                f"{source.place((trainer.model_key,))}: {trainer.model_key}: got "
                f"{shown(source.values[trainer.model_key])}; allowed: a folder or a hub id"
            ]
        )
    trainer.finish(draft)
    return draft


def render(draft: Draft, source: Path, output: Path) -> str:
    """The YAML of a recipe, each key with what it came from, and what was left."""
    name = re.sub(r"[^\w.+-]+", "-", source.stem).strip("-.") or "imported"
    lines = [
        f"# From the {draft.trainer} file {_comment(str(source))}. Every key says what it came from; what "
        "was left is listed at the end.",
        "#",
        f"#     lowbit-ft plan {_comment(str(output))}        # check everything, show layers and memory; "
        "loads nothing",
        f"#     lowbit-ft run  {_comment(str(output))}",
        "",
        f"name: {json.dumps(name)}",
    ]
    for section in SECTIONS:
        tree: dict[str, Any] = {}
        for key, value in draft.values.items():
            head, *rest = key.split(".")
            if head == section:
                _put(tree, rest, value)
        if tree:
            lines += ["", f"{section}:", *_lines(tree, 1)]
    value, origin = draft.values.get("output", (f"runs/{name}", "no key of theirs"))
    lines += ["", f"output: {json.dumps(value)}  # {_comment(origin)}"]
    if draft.left:
        lines += ["", f"# Left out of {_comment(source.name)}:"]
        lines += [
            f"#   {_comment(key)}: {_comment(shown(_value(draft.theirs, key)))} - {_comment(why)}"
            for key, why in draft.left
        ]
    return "\n".join(lines) + "\n"


def write_imported(source: Path, output: Path, *, force: bool = False) -> Draft:
    """Import `source` and write the recipe to `output`. ValueError when that exists (and not `force`)."""
    refuse_existing(output, force, "choose another name with -o")
    draft = import_recipe(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, render(draft, source, output))
    return draft


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _lines(tree: dict[str, Any], depth: int) -> list[str]:
    out = []
    for key, value in tree.items():
        if isinstance(value, dict) and all(part.isdecimal() for part in value):  # a list, by its places
            out.append(f"{'  ' * depth}{key}:")
            for entry in value.values():
                first, *others = _lines(entry, depth + 2)
                out += [f"{'  ' * (depth + 1)}- {first.lstrip()}", *others]
        elif isinstance(value, dict):
            out += [f"{'  ' * depth}{key}:", *_lines(value, depth + 1)]
        else:
            # JSON is YAML, and quotes what YAML would read as something else.
            text = f"{'  ' * depth}{key}: {json.dumps(value[0], ensure_ascii=False)}"
            out.append(f"{text:<44}  # {_comment(value[1])}")
    return out


def _value(values: Any, key: str) -> Any:
    """values at "datasets.0.type"; None where there is no such thing (a default of theirs)."""
    if isinstance(values, dict) and key in values:
        return values[key]
    head, _, rest = key.partition(".")
    if isinstance(values, dict):
        return _value(values[head], rest) if head in values and rest else None
    if isinstance(values, list) and head.isdecimal() and int(head) < len(values):
        return _value(values[int(head)], rest) if rest else values[int(head)]
    return None


def _comment(text: str) -> str:
    """Text that stays on its comment line."""
    return "".join(character if character.isprintable() else "?" for character in text)
