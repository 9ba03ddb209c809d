"""Rows that a calibrator looks at: a file, a hub data set, rows in memory or token windows become the batches
of one seeded choice.

A recipe's quant.calibration, `lowbit-ft quantize --data` and the `calibration=` of LowBitQuantConfig all come
through `calibration_windows` (data/chosen.py), so the same rows give the same windows and the same codes.
Rows in memory are put into a temporary jsonl file and read as one: there is one reader, and one set of
errors.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..data.errors import DataError
from ..data.formats import FORMATS
from ..data.read import read_rows
from ..names import did_you_mean
from ..recipe.sections.calibration import CalibrationSection
from ..recipe.sections.data import DataSource


def window_batch(text: CalibrationSection) -> int:
    """Windows that pass a layer at a time."""
    return max(1, text.batch_tokens // text.sequence_len)


@contextmanager
def as_source(given: Any) -> Iterator[DataSource]:
    """A DataSource of what a user has: the path of a file or a hub id; or rows, each a text, a mapping with
    the columns of a format, or token ids (a tensor, a list). ValueError for anything else."""
    if isinstance(given, str | Path):
        yield DataSource(path=str(given), format=format_by_columns(str(given)))
        return
    with tempfile.TemporaryDirectory(prefix="lowbit_ft-rows-") as folder:
        path = Path(folder, "calibration.jsonl")
        with path.open("w", encoding="utf-8") as file:
            for number, row in enumerate(_rows(given), 1):
                try:
                    file.write(json.dumps(_row(row)) + "\n")
                except TypeError as error:
                    raise ValueError(f"calibration: row {number}: {error}; a row is plain JSON") from None
        if not path.stat().st_size:
            raise ValueError("calibration: got no rows; give some, or calibrate='mse', which looks at none")
        yield DataSource(path=str(path), format=format_by_columns(str(path)))


def refuse_rows(given: Any) -> None:
    """ValueError where rows in memory are none, as far as can be told before a model is there; a path is
    looked for by the checks of a recipe."""
    rows = _rows(given)
    if isinstance(rows, Sequence | torch.Tensor):
        if not len(rows):
            raise ValueError("calibration: got no rows; give some, or calibrate='mse', which looks at none")
        _row(rows[0])


def _rows(given: Any) -> Iterable[Any]:
    if isinstance(given, torch.Tensor) and given.dim() != 2:
        raise ValueError(f"calibration: got a tensor {list(given.shape)}; allowed: token ids [rows, tokens]")
    allowed = "allowed: the path of a file, or rows (texts, mappings, token ids)"
    if isinstance(given, Mapping):
        keys = CalibrationSection.model_fields
        hints = [f"{key}{did_you_mean(key, keys) if key not in keys else ' is a keyword'}" for key in given]
        raise ValueError(
            f"calibration: got a mapping ({', '.join(hints)}); {allowed}; the keys of quant.calibration are "
            f"keywords beside it: {', '.join(key for key in keys if key != 'path')}"
        )
    if not isinstance(given, Iterable):
        raise ValueError(f"calibration: got {given!r}, a {type(given).__name__}; {allowed}")
    return given


def _row(row: Any) -> dict[str, Any]:
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, Mapping):
        ids = row.get("input_ids")
        return {"input_ids": _ids(ids)} if ids is not None else dict(row)
    return {"input_ids": _ids(row)}


def _ids(row: Any) -> list[int]:
    ids = row.tolist() if isinstance(row, torch.Tensor) else list(row) if isinstance(row, Iterable) else None
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise ValueError(
            "calibration: a row is a text, a mapping, or token ids, which are integers in one dimension"
        )
    return ids


def format_by_columns(path: str) -> str:
    """The format whose columns the first row has."""
    if Path(path).suffix in (".txt", ".md"):
        return "text"
    first = next(iter(read_rows(DataSource(path=path, format="text", limit=1), streaming=True)), None)
    if first is None or first.value is None:
        raise DataError(first.problem or "not a row" if first else "the data set is empty", path)
    # Token ids first: rows that carry their text beside them are read as they were tokenized.
    for name, kind in sorted(FORMATS.items(), key=lambda item: "input_ids" not in item[1].columns):
        if kind.told_by and any(set(columns) <= first.value.keys() for columns in kind.told_by):
            return name
    wanted = "; ".join(" or ".join("+".join(c) for c in k.told_by) for k in FORMATS.values() if k.told_by)
    raise DataError(f"its columns are {', '.join(first.value) or 'none'}; allowed: {wanted}", path)
