"""The recipe: what a run is, in one YAML file, checked as a whole before anything is loaded.

Nested by noun (model, task, quant, adapter, data, train, eval, export), leaf names as Hugging Face users know
them, unknown keys refused. The `adapter` section is the config class of its `method`
(lowbit_ft.adapters.ADAPTERS). The keys of a section, and what they mean for the others and for this
machine, are in its file in sections/; which checks run in which order in check.py; lines of the file in
yaml.py, wording of errors in errors.py. No key of a recipe enables remote code.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from ..adapters import AdapterConfig
from ..names import did_you_mean, without_folders
from ..tasks import TASKS, USUAL, Task
from .check import check, check_files
from .check import check as cross_check
from .defaults import resolve
from .errors import to_problems
from .incoming import resolve_quant
from .paths import located
from .sections.base import Section
from .sections.data import DataSection
from .sections.eval import EvalSection
from .sections.export import ExportSection
from .sections.model import ModelSection
from .sections.quant import QuantSection
from .sections.train import TrainSection
from .values import OneKind, OneMethod, for_method
from .yaml import MOST_PROBLEMS, Problem, RecipeError, apply_override, read_source

# Keys of text for a model, which may begin with a slash and is no path.
WORDS = ("generate", "system", "chat_template_kwargs")


class Recipe(Section):
    """One run. See the sections for what each key means; `load_recipe` reads one from YAML."""

    name: str = Field(
        min_length=1, pattern=r"^[\w.+-]+$", description="of the run, for logs and the model card"
    )
    model: ModelSection = Field(description="the checkpoint")
    task: Annotated[Task, OneKind(TASKS, USUAL, alone=True)] = Field(
        default_factory=lambda: TASKS[USUAL](kind=USUAL), description="what the model is for"
    )
    quant: QuantSection = Field(default_factory=QuantSection, description="the grid of the base")
    adapter: Annotated[AdapterConfig, OneMethod()] = Field(description="the method and its own keys")
    data: DataSection = Field(description="the data")
    train: TrainSection = Field(description="the loop")
    eval: EvalSection = Field(default_factory=EvalSection, description="the measurements")
    export: ExportSection = Field(default_factory=ExportSection, description="the target")
    output: Path = Field(description="folder of the run")

    def to_yaml(self) -> str:
        """Every key with its value, defaults included; `load_recipe` reads it back to an equal recipe."""
        return _dumped(self.model_dump(mode="json"))

    def to_card(self) -> str:
        """The same for others: without the folders of this machine that paths are in, and with the name of
        the file beside the model for the text of the chat template."""
        values = self.model_dump(mode="json")
        if self.data.chat_template is not None:
            values["data"]["chat_template"] = "chat_template.jinja"
        return _dumped(_shown(values))


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as lines."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def _dumped(values: Any) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _shown(value: Any, key: str = "") -> Any:
    if key in WORDS:
        return value
    if isinstance(value, dict):
        return {name: _shown(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_shown(part, key) for part in value]
    return without_folders(value) if isinstance(value, str) else value


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe; `adapter` is a oneOf by method."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def check_recipe(recipe: Recipe) -> list[Problem]:
    """What one section means for another, the model and the machine: the problems found, nothing loaded. See
    check.py.
    """
    return check({name: getattr(recipe, name) for name in Recipe.model_fields})


def _validator(name: str) -> TypeAdapter[Any]:
    """The validator of one key of Recipe, bounds and the adapter's discriminator included."""
    info: Any = Recipe.model_fields[name]
    return TypeAdapter(Annotated[info.annotation, info])  # pyright: ignore[reportArgumentType, reportInvalidTypeForm]


def _rest(name: str, given: Any, wrong: Sequence[Problem]) -> dict[str, Any]:
    """{name: the section without the keys that are wrong, or without the whole parts that they are in}; empty
    where that is no section."""
    paths = [
        list(itertools.takewhile(lambda part: isinstance(part, str), problem.path[1:])) for problem in wrong
    ]
    for depth in (None, 1):
        left = copy.deepcopy(given)
        for inside in [path[:depth] for path in paths if path]:
            holder = left
            for part in inside[:-1]:
                holder = holder.get(part) if isinstance(holder, dict) else None
            if isinstance(holder, dict):
                holder.pop(inside[-1], None)
        try:
            return {name: _validator(name).validate_python(for_method(left) if name == "adapter" else left)}
        except ValidationError:
            continue
    return {}


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    check: bool = True,
    folders: Sequence[Path] | None = None,
) -> Recipe:
    """Read a recipe and check it as a whole.

    Args:
        path: the YAML file.
        overrides: `a.b=value` texts, value in YAML, applied in order over the file.
        check: also run the cross checks (method, grid, layers, files, machine).
        folders: where relative paths of models and data are looked for, in that order; None: in the current
            folder, then beside the recipe. A path that is nowhere stays as it is written; with no folder at
            all every path does, and no checkpoint is asked for its grid.

    Raises:
        FileNotFoundError: there is no such file.
        RecipeError: lists every problem, one per line, with file:line.
    """
    source = read_source(Path(path))
    for override in overrides:
        apply_override(source, override)
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    rest: dict[str, Any] = {}  # what is right of sections with a wrong key
    known = ", ".join(Recipe.model_fields)
    unknown = [key for key in source.values if key not in Recipe.model_fields]
    for key in unknown[:MOST_PROBLEMS]:
        hint = did_you_mean(key, Recipe.model_fields) or f"; allowed: {known}"
        problems.append(Problem((key,), f"unknown key{hint}"))
    if len(unknown) > MOST_PROBLEMS:
        problems.append(Problem((unknown[-1],), f"and {len(unknown) - MOST_PROBLEMS} more unknown keys"))
    for name, info in Recipe.model_fields.items():
        given = source.values.get(name)
        if name not in source.values or (
            given is None and isinstance(info.annotation, type) and issubclass(info.annotation, Section)
        ):
            given = {}  # a section left out or left empty is judged by what it must hold
        if name not in source.values and name in ("name", "output"):
            problems.append(Problem((name,), f"missing; add `{name}: ...` ({info.description})"))
            continue
        try:
            value = for_method(given) if name == "adapter" else given
            values[name] = _validator(name).validate_python(value)
        except ValidationError as error:
            wrong = to_problems(name, info.annotation, error.errors(include_url=False), given)
            problems += wrong
            rest |= _rest(name, given, wrong)
    folders = (Path(), Path(path).parent) if folders is None else folders
    values = {name: located(value, folders) for name, value in values.items()}
    if folders and "model" in values and "quant" in values:
        values["quant"], against = resolve_quant(values["model"], values["quant"])
        problems += against
    values = resolve(values)
    if check:
        problems += cross_check(values)
        problems += check_files({name: located(value, folders) for name, value in rest.items()})
    lines = source.lines(problems)
    if lines:
        raise RecipeError(lines)
    return Recipe(**values)
