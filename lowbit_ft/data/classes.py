"""classes: the names that a data set of `datasets` has for the numbers in a column (ClassLabel)."""

from __future__ import annotations

from typing import Any

from ..names import listed
from .errors import DataError
from .mix import named, sources_of
from .read import features_of


def class_names(source: Any, column: str, within: str | None = None) -> list[str] | None:
    """The names of the numbers in a column (or, within a column of objects, in a key of these), by number;
    None where they have none. DataError where sources, or files of one, name them otherwise: the same number
    would be two things."""
    found: list[str] | None = None
    for one in sources_of(source):
        for features in features_of(one):
            names = _names(features, within or column, column)
            if names is None:
                continue
            if found is not None and names != found:
                raise DataError(
                    f"{column!r}: its numbers stand for {listed(names[:8])} here and for {listed(found[:8])} "
                    "in what was read before; write them as names, in the same words",
                    named(one),
                )
            found = names
    return found


def _names(features: Any, outer: str, column: str) -> list[str] | None:
    feature = (features or {}).get(outer)
    while not isinstance(feature, dict) or column in feature:
        if isinstance(feature, dict):  # objects, or lists of their parts
            feature = feature[column]
        elif isinstance(feature, list) and feature:
            feature = feature[0]
        elif (inner := getattr(feature, "feature", None)) is not None:
            feature = inner
        else:
            break
    names = getattr(feature, "names", None)
    if not isinstance(names, list) or names == [str(i) for i in range(len(names))]:
        return None
    return [str(name) for name in names]
