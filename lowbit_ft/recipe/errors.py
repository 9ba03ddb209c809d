"""From a pydantic error to one line a person can act on: got X; allowed ...; did you mean '...'?; fix.

Pydantic knows what is wrong; it does not know which keys would have been right, and its places name union
members that nobody wrote. Both are mended here by walking the values that were given and the model they
were meant for side by side.
"""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from ..adapters import ADAPTERS, AdapterConfig
from ..data.synthesis import SYNTHESIS, SynthesisConfig
from ..gradients import GRADIENTS, USUAL, GradientConfig
from ..grid import GRIDS
from ..names import did_you_mean, nearest
from ..tasks import TASKS, Task
from ..tasks import USUAL as CAUSAL
from .yaml import MOST_PROBLEMS, KeyPath, Problem

FEW = 10  # keys that are listed beside the one that was meant
LONGEST = 80  # characters of a wrong value that are shown


def shown(value: Any) -> str:
    """The value as it was read, cut to a readable length."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4300 digits
        text = "a number with thousands of digits"
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def model_of(annotation: Any, given: Any) -> type[BaseModel] | None:
    """The model class behind `Model`, `Model | None`, `list[Model]`, the adapter section (the config of the
    method that was given), data.synthesis, train.gradient or task (that of the kind).
    """
    if annotation is AdapterConfig and isinstance(given, dict):
        return ADAPTERS.get(str(given.get("method")))
    if annotation is SynthesisConfig and isinstance(given, dict):
        return SYNTHESIS.get(str(given.get("kind")))
    if annotation is GradientConfig and isinstance(given, dict):
        return GRADIENTS.get(str(given.get("kind", USUAL)))
    if annotation is Task and isinstance(given, dict):
        return TASKS.get(str(given.get("kind", CAUSAL)))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    models = [found for part in get_args(annotation) if (found := model_of(part, given)) is not None]
    if not models:
        return None
    return models[-1] if isinstance(given, list) else models[0]  # `Model | list[Other]`: by what was written


def keys_of(model: type[BaseModel]) -> dict[str, Any]:
    """The fields of a section by the words that are written (`lambda` is none that Python has)."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def written_path(location: tuple[int | str, ...], given: Any) -> KeyPath:
    """A pydantic location without the union members in it: parts that are not keys of what was written (a
    missing last key stays).
    """
    path: list[str | int] = []
    for depth, part in enumerate(location):
        known = (isinstance(given, dict) and part in given) or (
            isinstance(given, list | tuple) and isinstance(part, int) and part < len(given)
        )
        if known:
            given = given[part]  # type: ignore[index] - checked just above
            path.append(part)
        elif depth == len(location) - 1 and isinstance(given, dict):
            path.append(part)
    return tuple(path)


def to_problems(section: str, annotation: Any, details: list[ErrorDetails], given: Any) -> list[Problem]:
    """The errors of validating `given` as `annotation`, as Problems of the recipe."""
    told = (
        "default_factory_not_called"  # a default that waits for another value, whose own error is in the list
    )
    wrong = [detail for detail in details if detail["type"] != told]
    problems = _one_each(
        [_to_problem(section, annotation, detail, given) for detail in wrong[:MOST_PROBLEMS]]
    )
    if len(wrong) > MOST_PROBLEMS:
        problems.append(Problem((section,), f"and {len(wrong) - MOST_PROBLEMS} more problems"))
    return problems


def _one_each(problems: list[Problem]) -> list[Problem]:
    """One problem for each value: a number or a word is refused once as a number and once as a word."""
    found: dict[tuple[KeyPath, str], Problem] = {}
    for problem in problems:
        got, allowed, rest = problem.message.partition("; allowed: ")
        key = (problem.path, got if allowed else problem.message)
        if key in found and allowed:
            rest = f", or {rest}"
            found[key] = Problem(problem.path, found[key].message + rest)
        else:
            found[key] = problem
    return list(found.values())


def _methods_with(key: object) -> list[str]:
    """The adapter methods that have this key."""
    return [name for name, config in ADAPTERS.items() if key in config.model_fields]


def _to_problem(section: str, annotation: Any, detail: ErrorDetails, given: Any) -> Problem:
    location = detail["loc"]
    kind = detail["type"]
    method = given.get("method") if isinstance(given, dict) else None
    if section == "adapter" and location[:1] == (method,):
        location = location[1:]  # the discriminator's tag
    inside = written_path(location, given)
    path: KeyPath = (section, *inside)
    context = detail.get("ctx", {})

    # The model and the values that the last key of the path belongs to.
    model, holder = model_of(annotation, given), given
    for part in inside[:-1]:
        holder = holder[part]
        if model is not None and isinstance(part, str):
            field = keys_of(model).get(part)
            model = model_of(field.annotation, holder) if field is not None else None
    fields = keys_of(model) if model is not None else {}

    if kind == "extra_forbidden":
        # A word that is nearly a key is that key; of what is only like several, one that is not set yet.
        unused = [name for name in fields if not (isinstance(holder, dict) and name in holder)]
        close = (
            nearest(inside[-1], fields, cutoff=0.8)
            or nearest(inside[-1], unused)
            or nearest(inside[-1], fields)
        )
        hint = f"; did you mean '{close}'?" if close else ""
        if section == "adapter" and (others := _methods_with(inside[-1])):
            hint = f" of {method}; {', '.join(others)} {'have' if len(others) > 1 else 'has'} it: remove it"
        known = f"; allowed: {', '.join(fields)}" if len(fields) <= FEW or not hint.endswith("?") else ""
        return Problem(path, f"unknown key{hint}{known}")
    if kind == "missing":
        about = fields[str(inside[-1])].description if inside and str(inside[-1]) in fields else ""
        return Problem(path, f"missing; add `{path[-1]}: ...`{f' ({about})' if about else ''}")
    if kind == "union_tag_not_found":
        return Problem((*path, "method"), f"missing; add `method: ...`; allowed: {', '.join(ADAPTERS)}")
    if kind == "union_tag_invalid":
        return Problem(
            (*path, "method"),
            f"got {shown(method)}; allowed: {', '.join(ADAPTERS)}{did_you_mean(method, ADAPTERS)}",
        )

    got = f"got {shown(detail['input'])}"
    if kind == "literal_error":
        field = fields.get(str(inside[-1])) if inside else None
        allowed = (
            [value for value in _literals(field.annotation) if value is not None] if field is not None else []
        )
        if section == "quant" and inside == ("bits",) and isinstance(given, dict):
            allowed = (
                list(GRIDS[grid].widths) if (grid := str(given.get("grid", "integer"))) in GRIDS else allowed
            )
        listed = ", ".join(map(str, allowed)) or str(context.get("expected", "")).replace("'", "")
        return Problem(path, f"{got}; allowed: {listed}{_meant(detail['input'], allowed)}")
    if kind == "value_error":
        return Problem(path, f"got {context.get('error', detail['msg'])}")
    if kind in {"model_type", "model_attributes_type", "dict_type"}:
        field = fields.get(str(inside[-1])) if inside else None
        wanted = model_of(field.annotation, None) if field is not None else model
        keys = f" with the keys {', '.join(keys_of(wanted))}" if wanted is not None else ""
        return Problem(path, f"{got}; allowed: a mapping{keys}; indent its keys under it")
    if kind in {"string_type"}:
        return Problem(path, f"{got}; allowed: text; put it in quotes")
    if kind == "tuple_type" or kind == "list_type":
        return Problem(path, f"{got}; allowed: a list; write [a, b]")
    if kind == "too_short":
        return Problem(path, f"{got}; allowed: at least {context.get('min_length', 1)} of them")
    if kind == "path_type":
        return Problem(path, f"{got}; allowed: the path of a folder")
    # pydantic: "Input should be a valid integer, unable to parse string as an integer"
    message = (
        detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ").partition(", unable")[0]
    )
    message = message.replace("a valid ", "a ").replace("a integer", "an integer")
    return Problem(path, f"{got}; allowed: {message}")


def _meant(given: Any, allowed: list[Any]) -> str:
    """What may have been meant: of numbers the nearest, of words the one that is written most alike."""
    numbers = [value for value in allowed if isinstance(value, int) and value > 0]
    if isinstance(given, int) and not isinstance(given, bool) and given > 0 and numbers:
        return f"; the nearest is {min(numbers, key=lambda value: abs(value - given))}"
    return did_you_mean(given, allowed)


def _literals(annotation: Any) -> list[Any]:
    """The values of the Literal types in an annotation."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in _literals(part)]
