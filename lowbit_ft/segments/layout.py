"""layout: output segments in a file, so that what was trained on them is read as it was, whatever a later
transformers makes of the model:

    [{"parts": [[start, width, count, stride], ...], "layers": ["model.layers.0.self_attn.qkv_proj", ...]}]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..model.fused import Segment

Parts = tuple[Segment, ...]


def layout(parts: Mapping[str, Parts]) -> list[dict[str, Any]]:
    """By layer -> as it is written."""
    names: dict[Parts, list[str]] = {}
    for name, own in parts.items():
        names.setdefault(own, []).append(name)
    return [{"parts": [part.to_json() for part in own], "layers": found} for own, found in names.items()]


def read_layout(entries: Any) -> dict[str, Parts]:
    """The inverse of `layout`. ValueError naming what is wrong: the file may be a stranger's."""
    if not isinstance(entries, list):
        raise ValueError(f"segments: got {type(entries).__name__}; needs a list")
    found: dict[str, Parts] = {}
    for i, entry in enumerate(entries):
        rows, layers = (entry.get(key) if isinstance(entry, dict) else None for key in ("parts", "layers"))
        if not isinstance(rows, list) or not isinstance(layers, list):
            raise ValueError(f"segments[{i}]: needs an object with `parts` and `layers`")
        if len(rows) < 2 or not all(is_segment(row) for row in rows):
            raise ValueError(
                f"segments[{i}].parts: got {rows!r}; needs two or more lists [start, width, count, stride]"
            )
        for name in layers:
            if not isinstance(name, str) or name in found:
                raise ValueError(f"segments[{i}].layers: got {name!r}; needs names, each once")
            found[name] = tuple(Segment(*row) for row in rows)
    return found


def is_segment(row: Any) -> bool:
    """Whether it is a Segment as it is written: [start, width, count, stride]."""
    whole = isinstance(row, list) and len(row) == 4 and all(type(value) is int for value in row)
    return whole and row[0] >= 0 and 0 < row[1] < 1 << 31 and 0 < row[2] < 1 << 31 and 0 <= row[3] < 1 << 31
