"""The names of the labels: as the recipe gives them, as the checkpoint has them, or as the rows do.

Rows say a label by its name or by its number. Names are kept in config.json (id2label, label2id), where
everybody who loads the model finds them; numbers without names are LABEL_0, LABEL_1, ..., as transformers
calls them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from ..data.classes import class_names
from ..data.errors import BadRow, DataError, told
from ..data.mix import named, sources_of
from ..data.read import categories, read_rows
from ..names import did_you_mean, listed

UNKNOWN = ("LABEL_0", "LABEL_1")  # as transformers calls them, where nobody has looked yet
MOST = 10_000  # labels; a column of more is something else


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{twice[0]!r} more than once; allowed: names that differ, one for each label")
    return names


Distinct = Annotated[tuple[str, ...], AfterValidator(_distinct)]
Names = Annotated[Distinct, Field(min_length=2)]  # of labels


def label_values(names: Sequence[str] | None) -> dict[str, Any]:
    """What config.json says of labels in their order; nothing new (None) where nobody has looked yet."""
    if names is None:
        return {}
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def label_id(value: Any, column: str, names: Sequence[str]) -> int:
    """The number of a label that a row says by name or number. BadRow, also for a number that is the name of
    another label than the one of this number."""
    if isinstance(value, int) and not isinstance(value, bool):
        if str(value) in names and list(names).index(str(value)) != value:
            raise BadRow(
                f"{column!r}: got the number {value}, and {str(value)!r} is the name of label "
                f"{list(names).index(str(value))} (task.labels): which is meant? Write names as text "
                f"({json.dumps(str(value))}), or give the labels names that are no numbers"
            )
        if 0 <= value < len(names):
            return value
        raise BadRow(f"{column!r}: got label {value}; allowed: 0 to {len(names) - 1} (task.labels)")
    if not isinstance(value, str):
        raise BadRow(f"{column!r} must be the name or the number of a label; got {told(value)}")
    if value not in names:
        raise BadRow(
            f"{column!r}: got label {value!r}; allowed: {listed(names[:20])} (task.labels)"
            f"{did_you_mean(value, names)}"
        )
    return list(names).index(value)


def found_labels(source: Any, column: str, config: Mapping[str, Any], within: str | None = None) -> list[str]:
    """The labels in a column of the rows (or, within a column of objects, in a key of these): numbers by the
    names that the data set has for them, else by the checkpoint's; names in the checkpoint's order where it
    has the same ones, else sorted. DataError for a column of neither."""
    seen: set[Any] = set()
    for value in _values(source, column, within):
        seen.add(value)
        if len(seen) > MOST:
            raise DataError(
                f"{column!r} holds more than {MOST:,} labels; name them in task.labels", named(source)
            )
    if not seen:
        raise DataError(f"no row has a label in {column!r} (task.label)", named(source))
    known = known_labels(config)
    if all(isinstance(value, int) for value in seen):
        if min(seen) < 0:
            raise DataError(f"{column!r} holds the label {min(seen)}: rows without an answer", named(source))
        count = max(seen) + 1
        if count > MOST:
            raise DataError(
                f"{column!r} holds the label {max(seen)}, and labels are counted from 0: more than {MOST:,}; "
                "name them in task.labels, or give another column (task.label)",
                named(source),
            )
        said = class_names(source, column, within)
        if said is not None and len(said) >= count:
            return _in_order(said, known, column, source)
        return known if len(known) >= count else unnamed(count)
    if not all(isinstance(value, str) for value in seen):
        raise DataError(f"{column!r} holds names and numbers; name the labels in task.labels", named(source))
    return known if set(known) >= seen else sorted(seen)


def _in_order(said: list[str], known: list[str], column: str, source: Any) -> list[str]:
    """The names of a data set for its numbers, in the checkpoint's letters where these are its labels.
    DataError where the checkpoint has them in another order: its head fits, and would answer by others."""
    ours, theirs = ([name.lower() for name in names] for names in (said, known))
    if ours == theirs:
        return known
    if sorted(ours) == sorted(theirs):
        raise DataError(
            f"the numbers in {column!r} stand for {listed(said[:8])}, and config.json of the checkpoint has "
            f"these labels as {listed(known[:8])}: its head would answer by others. Write names into the "
            "rows in place of numbers",
            named(source),
        )
    return said


def categories_of(source: Any) -> list[str] | None:
    """The categories that annotation files of COCO name, in the order of their ids; None where a source is
    something else. DataError."""
    found: dict[str, None] = {}
    for one in sources_of(source):
        if (names := categories(one)) is None:
            return None
        found |= dict.fromkeys(names)
    return list(found) or None


def ordered(names: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """Labels that somebody has named, in the order that a checkpoint has them in where it knows them all."""
    known = known_labels(config)
    return known if set(known) >= {*names} else list(names)


def labels_in(source: Any, column: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """`found_labels` for one label per row. DataError where there is but one."""
    found = found_labels(source, column, config)
    if len(found) < 2:
        raise DataError(f"the only label in {column!r} is {found[0]!r}: nothing to tell apart", named(source))
    return tuple(found)


def known_labels(config: Mapping[str, Any]) -> list[str]:
    """The labels that a checkpoint was trained on by its config.json; none where it names none, or two
    alike."""
    names = config.get("id2label")
    if not isinstance(names, Mapping) or not names:
        return []
    try:
        found = [str(names[key]) for key in sorted(names, key=int)]
    except (TypeError, ValueError):
        return []
    return found if len({*found}) == len(found) else []


def unnamed(count: int) -> list[str]:
    """What transformers calls so many labels that nobody has named."""
    return [f"LABEL_{i}" for i in range(count)]


def _values(source: Any, column: str, within: str | None) -> Iterator[Any]:
    """The labels in a column, those of lists one by one; malformed rows are left to the reader of rows."""
    for one in sources_of(source):
        for row in read_rows(one):
            value = row.value if within is None or row.value is None else row.value.get(within)
            if isinstance(value, list):
                value = {column: [one.get(column) for one in value if isinstance(one, dict)]}
            value = value.get(column) if isinstance(value, dict) else None
            values: Iterable[Any] = value if isinstance(value, list) else [value]
            yield from (v for v in values if isinstance(v, int | str) and not isinstance(v, bool))
