"""Numbers as PyYAML leaves them, read for the field they are for."""

from __future__ import annotations

import math
from typing import Any, get_args

from pydantic_core import PydanticCustomError

from ..adapters import ADAPTERS


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
    pydantic to refuse).
    """
    config = ADAPTERS.get(str(given.get("method"))) if isinstance(given, dict) else None
    if config is None:
        return given
    result = dict(given)
    for key, value in given.items():
        if key in config.model_fields:
            try:
                result[key] = number(config.model_fields[key].annotation, value)
            except PydanticCustomError:
                result[key] = str(value).lower()  # "true" is not a number to pydantic either
    return result
