"""`lowbit-ft quantize MODEL --bits 4`: a checkpoint becomes a packed folder, with no recipe around it.

The options are the keys of `quant` that most people set; any other follows as `quant.key=value`, and what a
recipe's `model` section says as `model.key=value`. What is written is a native folder: from_pretrained reads
it, PEFT and TRL train on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from ..quantize.direct import Direct, pack_folder
from ..recipe.errors import to_problems
from ..recipe.sections.model import ModelSection, check_device, check_model
from ..recipe.sections.quant import check_layers
from ..recipe.yaml import RecipeError, Source, apply_override
from ..session import pick_device


def quantize_model(
    model: str,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    data: str | None = None,
    output: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Pack the checkpoint `model` (folder or hub id) and return the folder. options: keys of quant; data:
    what gptq and signround look at; output: default a folder here, named after the model and its bits.
    ValueError with a line for everything that is wrong, before anything is read."""
    console = console or Console()
    source = Source("the command line")
    source.values = {"model": {"path": model}, "quant": dict(options or {})}
    for text in overrides:
        apply_override(source, text)
    others = sorted(source.values.keys() - {"model", "quant"})
    problems = source.problems + [
        f"{name}: a section of a recipe; here there are quant.* and model.* (a whole run: lowbit-ft init "
        f"{model})"
        for name in others
    ]
    given = source.values["model"]
    try:
        section = ModelSection.model_validate(given)
    except ValidationError as error:
        found = to_problems("model", ModelSection, error.errors(include_url=False), given)
        raise RecipeError(problems + [str(problem) for problem in found]) from None
    asked = source.values["quant"] or {}
    if not isinstance(asked, dict):
        problems.append(f"quant: got {asked!r}; write quant.key=value, such as quant.bits=3")
        raise RecipeError(problems)
    problems += _twice(asked, dict(options or {}), data)
    if section.add_tokens is not None:
        problems.append(
            "model.add_tokens: new rows have to be trained, and here nothing is; remove it, or write a "
            f"recipe (lowbit-ft init {model})"
        )
    if section.path != model:
        problems.append(f"model.path: got {section.path!r} beside {model!r}; name one model")
    try:
        direct = Direct.of(asked, data)
    except ValueError as error:
        raise RecipeError(problems + str(error).splitlines()) from None
    sections = SimpleNamespace(model=section, quant=direct.quant)
    for check in (check_model, check_device, check_layers):
        problems += [str(problem) for problem in check(sections)]
    if problems:
        raise RecipeError(problems)
    folder = output or Path(f"{_name(section.path)}-w{direct.quant.bits}")
    table = pack_folder(
        section.path,
        direct,
        folder,
        dtype=section.dtype,
        device=pick_device(section.device),
        revision=section.revision,
        attention=section.attention,
        console=console,
    )
    console.print(str(table), markup=False, highlight=False, soft_wrap=True)
    text = (
        f'packed: {folder}\nuse it: import lowbit_ft; AutoModelForCausalLM.from_pretrained("{folder}"), and '
        "get_peft_model(model, lowbit_ft.LowBitConfig(...)) to train it"
    )
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return folder


def _twice(asked: Mapping[str, Any], options: Mapping[str, Any], data: str | None) -> list[str]:
    """Keys of quant that an option says, and an override otherwise."""
    found = [
        f"quant.{key}: got {asked.get(key)!r} beside the option that says {value!r}; give one of the two"
        for key, value in options.items()
        if asked.get(key) != value
    ]
    text = asked.get("calibration")
    path = text.get("path") if isinstance(text, dict) else None
    if data is not None and path is not None:
        found.append(f"quant.calibration.path: got {path!r} beside --data {data}; give one of the two")
    return found


def _name(model: str) -> str:
    """A model's own name, as a folder's."""
    return re.sub(r"[^\w.+-]+", "-", Path(model.rstrip("/")).name).strip("-.").lower() or "model"
