"""Values of a recipe, read for the field they are for: numbers as PyYAML leaves them, and names of the
members of a table (grids, methods, formats, ...), which is read when the recipe is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from ..adapters import ADAPTERS
from ..names import did_you_mean
from .errors import shown


@dataclass(frozen=True, eq=False)
class OneOf:
    """Marks text that is a key of a table. The table is read whenever a recipe is validated or its schema is
    made, so what was added to it is known without another edit.
    """

    table: Mapping[str, object]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        return {**handler(schema), "enum": list(self.table)}

    def _known(self, value: str) -> str:
        if value not in self.table:
            allowed = ", ".join(self.table)
            raise ValueError(f"{shown(value)}; allowed: {allowed}{did_you_mean(value, self.table)}")
        return value


@dataclass(frozen=True, eq=False)
class Among:
    """Marks text that is a key of a table or something else (a path): the schema has the keys as examples."""

    table: Mapping[str, object]

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        return {**handler(schema), "examples": list(self.table)}


class OneMethod:
    """Marks the adapter section: the config class of its method in ADAPTERS, as the table is now."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(lambda value: _methods().validate_python(value))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        return handler(_methods().core_schema)


@dataclass(frozen=True, eq=False)
class OneKind:
    """Marks a section that is the config class of its `kind` in a table, as the table is now. usual: the kind
    of one that names none. alone: the kind alone, as a word, is one without keys."""

    table: Mapping[str, Any]
    usual: str | None = None
    alone: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        found = handler(_kinds_of(self.table, "kind").core_schema)
        return {"anyOf": [{"enum": list(self.table)}, found]} if self.alone else found

    def _read(self, value: Any) -> Any:
        value = {"kind": value} if self.alone and isinstance(value, str) else value
        if not isinstance(value, dict):  # a config that was validated before
            return _kinds_of(self.table, "kind").validate_python(value)
        kind = value.get("kind", self.usual)
        config = self.table.get(str(kind))
        if config is None:
            got = "no kind" if kind is None else shown(kind)
            allowed = ", ".join(self.table)
            raise ValueError(f"{got}; allowed: kind: {allowed}{did_you_mean(kind or '', self.table)}")
        return config.model_validate(numbers(config, value))


def _methods() -> TypeAdapter[Any]:
    """The validator of all config classes of ADAPTERS, told apart by method."""
    return _kinds_of(ADAPTERS, "method")


def _kinds_of(table: Mapping[str, Any], key: str) -> TypeAdapter[Any]:
    """The validator of the config classes of a table, told apart by that key."""
    kinds: Any = Union[tuple(table.values())]  # noqa: UP007 - built from the table
    told_apart: Any = Annotated[kinds, Field(discriminator=key)] if len(table) > 1 else kinds
    return TypeAdapter(told_apart)


def number(annotation: Any, value: Any) -> Any:
    """`value` for a field of that annotation: PyYAML reads 1e-4 and 1e3 (no dot) as text, and pydantic takes
    true for 1.
    """
    kinds = _kinds(annotation)
    if not kinds & {int, float} or bool in kinds:
        return value
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "a number")
    if isinstance(value, str) and str not in kinds:
        try:
            parsed = float(value)
        except ValueError:
            return value
        return int(parsed) if int in kinds and math.isfinite(parsed) and parsed == int(parsed) else parsed
    return value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types an annotation is made of: Annotated[int, ...] | None -> {int, NoneType}; literals count
    as their type.
    """
    found: set[Any] = set()
    for part in get_args(annotation):
        found |= _kinds(part) if get_args(part) or isinstance(part, type) else {type(part)}
    return found or {annotation}


def for_method(given: Any) -> Any:
    """The adapter section with its numbers read as the other sections' are (a wrong one stays as it was, for
    pydantic to refuse)."""
    config = ADAPTERS.get(str(given.get("method"))) if isinstance(given, dict) else None
    return given if config is None else numbers(config, given)


def numbers(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The values of a config class with their numbers read as the other sections' are."""
    result = dict(given)
    for key, value in given.items():
        if key in config.model_fields:
            try:
                result[key] = number(config.model_fields[key].annotation, value)
            except PydanticCustomError:
                result[key] = str(value).lower()  # "true" is not a number to pydantic either
    return result
