"""From a path to numbered rows.

    path  ->  files (or a hub data set)  ->  Row(file, number, value | problem)

A row that cannot be read is yielded with its `problem`, never raised: the caller decides between error and
skip. What is wrong with the file as a whole (missing, unreadable, not JSON at all) is raised as a DataError.

Row numbers are those a user finds again in an editor: the line for jsonl, csv and text, the index (from 1)
for json, parquet and the hub. That is why jsonl and csv are read here and not through `datasets`: its readers
guess a type per column (the answer "42" becomes a number) and their errors do not name the line. Parquet and
hub data sets do come through `datasets`, which since version 4 runs no code from a repository.

A .json file that is COCO's own (images, annotations, categories) is joined to rows (coco.py).

Pictures are rows {image: the path, label: the name of the folder it lies in}, where a folder holds nothing
else that is read but text; a metadata.csv (.jsonl, .parquet) beside them, as the imagefolder of `datasets`
has it, has the rows itself, each with the `file_name` of its picture, which is read as `image`. Those
inside parquet files and data sets stay as they are stored, {bytes, path}.

Text files (.txt, .md) are one document each; from `TEXT_PIECE` characters on they are cut at a line end.
"""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..files.regular import irregular
from ..model.images import SUFFIXES
from . import coco
from .errors import DataError, first_line, kind
from .splits import find_files, is_metadata, no_such_split, refuse_remote_keys, saved_dataset

TEXT_PIECE = 1 << 20  # characters; keeps one tokenizer call in tens of megabytes


@dataclass(frozen=True)
class Row:
    """One row of a data set: `value` (column -> value), or None and the `problem` that kept it from being
    read. folder: where the files that it names lie; None: beside its own."""

    file: str
    number: int
    value: dict[str, Any] | None = None
    problem: str | None = None
    folder: Path | None = None

    @property
    def beside(self) -> Path:
        """The folder that names of files in it start from."""
        return Path(self.file).parent if self.folder is None else self.folder


def read_rows(source: Any, *, streaming: bool = False, notes: list[str] | None = None) -> Iterator[Row]:
    """The rows of `source` (a recipe's DataSource: path, split, name, revision, limit), in order, `limit` at
    most.

    Local files are read lazily, one row at a time (a .json file whole). `streaming` is for the hub: read over
    the network as needed instead of downloading first. `notes` gets a line for each thing that is there and
    not read. Raises DataError.
    """
    split = getattr(source, "split", None) or "train"
    if saved_dataset(source.path):
        rows = _numbered(_saved_table(source), f"{source.path}[{split}]")
    else:
        files = find_files(source, READERS, notes if notes is not None else [], SUFFIXES)
        if files is None:
            rows = _numbered(_hub_table(source, streaming), f"hub:{source.path}[{split}]")
        else:
            rows = _read_files(files)
    if (media := getattr(source, "media_dir", None)) is not None:
        rows = (replace(row, folder=Path(media).expanduser()) for row in rows)
    limit = getattr(source, "limit", None)
    if limit is None:
        yield from rows
        return
    for _, row in zip(range(limit), rows, strict=False):
        yield row


def categories(source: Any) -> list[str] | None:
    """The categories that a source of COCO's own files names, in the order of their ids (of several files, as
    they come); None where one of its files is no such. DataError."""
    files = None if saved_dataset(source.path) else find_files(source, READERS, [], SUFFIXES)
    found: dict[str, None] = {}
    for file in files or ():
        if irregular(file) is not None or (names := coco.categories_of(file)) is None:
            return None
        found |= dict.fromkeys(names)
    return list(found) or None


def _read_files(files: list[Path]) -> Iterator[Row]:
    for file in files:
        suffix = file.suffix.lower()
        reader = _read_picture if suffix in SUFFIXES else READERS.get(suffix)
        if reader is None:
            raise DataError(f"unknown suffix {file.suffix!r}; known: {' '.join(READERS)}", str(file))
        if (what := irregular(file)) is not None:
            raise DataError(f"got {what}; allowed: a regular file", str(file))
        try:
            yield from map(_named_picture, reader(file)) if is_metadata(file) else reader(file)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", str(file)) from error


def _read_jsonl(file: Path) -> Iterator[Row]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _json_row(str(file), number, line)


def _json_row(file: str, number: int, line: bytes) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(
            file, number, problem=f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"
        )
    except json.JSONDecodeError as error:
        return Row(file, number, problem=f"invalid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nesting without end
        return Row(file, number, problem=f"invalid JSON: {error}")
    return _as_row(file, number, value)


def _as_row(file: str, number: int, value: object) -> Row:
    if isinstance(value, dict):
        return Row(file, number, value)
    return Row(file, number, problem=f"a row is an object with keys; got {kind(value)}")


def _read_json(file: Path) -> Iterator[Row]:
    """A list of objects; an object whose only list holds them ({"data": [...]}); COCO's tables; or JSON lines
    under this suffix."""
    if (joined := coco.rows_of(file)) is not None:
        folder: Path | None = None
        for number, (value, problem) in enumerate(joined, 1):
            if folder is None and value is not None:
                folder = coco.pictures_of(file, value["image"])
            yield Row(str(file), number, value, problem, folder)
        return
    raw = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"not UTF-8: byte 0x{raw[error.start]:02x}", str(file), line) from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and raw.lstrip().startswith(b"{"):
            yield from _read_jsonl(file)
            return
        raise DataError(
            f"invalid JSON: {error.msg} at column {error.colno}", str(file), error.lineno
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"invalid JSON: {error}", str(file)) from error
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        # one row alone ({"messages": [...]}) has one list too: its key tells
        value = lists[0] if len(lists) == 1 and not {"messages", "conversations"} & value.keys() else [value]
    if not isinstance(value, list):
        raise DataError(f"expected a list of rows; got {kind(value)}", str(file))
    for number, item in enumerate(value, 1):
        yield _as_row(str(file), number, item)


def _read_csv(file: Path) -> Iterator[Row]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            number = reader.line_num + 1
            # The field limit (131072 characters) is global to csv: lifted for one call, then put back.
            limit = csv.field_size_limit(sys.maxsize)
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(str(file), number, problem=f"invalid CSV: {error}")
                continue
            finally:
                csv.field_size_limit(limit)
            if not fields:
                continue
            if header is None:
                header = fields
            elif len(fields) != len(header):
                yield Row(str(file), number, problem=f"{len(fields)} fields; the header has {len(header)}")
            else:
                yield Row(str(file), number, dict(zip(header, fields, strict=True)))


def _read_text(file: Path) -> Iterator[Row]:
    piece: list[str] = []
    size, first = 0, 1
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            piece.append(line)
            size += len(line)
            if size >= TEXT_PIECE:
                yield Row(str(file), first, {"text": "".join(piece)})
                piece, size, first = [], 0, number + 1
    if size:
        yield Row(str(file), first, {"text": "".join(piece)})


def _named_picture(row: Row) -> Row:
    """A row of a metadata file: what names a picture is one."""
    value = row.value or {}
    name = value.get("file_name")
    if "image" in value or not isinstance(name, str) or Path(name).suffix.lower() not in SUFFIXES:
        return row
    return replace(row, value={"image": name, **{k: v for k, v in value.items() if k != "file_name"}})


def _read_picture(file: Path) -> Iterator[Row]:
    yield Row(str(file), 1, {"image": str(file), "label": file.parent.name})


class Stored(dict[str, Any]):
    """{bytes, path} of a picture in a table that lies on the disk. again(): the same, read once more."""

    def __init__(self, value: dict[str, Any], again: Callable[[], Any]) -> None:
        super().__init__(value)
        self.again = again


def _stored(table: Any) -> tuple[Any, list[str]]:
    """A table of `datasets` whose pictures stay as they are stored, and the columns of these."""
    import datasets  # as below

    pictures = [name for name, kind in (table.features or {}).items() if isinstance(kind, datasets.Image)]
    for name in pictures:
        table = table.cast_column(name, datasets.Image(decode=False))
    return table, pictures


def features_of(source: Any) -> list[Any]:
    """The types that `datasets` has for the columns of a source, for each of its files; none of what is no
    table of `datasets`. DataError."""
    if saved_dataset(source.path):
        return [_saved_table(source).features]
    files = find_files(source, READERS, [], SUFFIXES)
    if files is None:
        return [_hub_table(source, False).features]
    if any(file.suffix.lower() != ".parquet" or irregular(file) is not None for file in files):
        return []
    found = []
    for file in files:
        with _readable_parquet(file):
            found.append(_parquet_table(file).features)
    return found


@contextmanager
def _readable_parquet(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # pyarrow and datasets raise many kinds for a broken file
        raise DataError(f"not a readable parquet file: {first_line(error)}", str(file)) from error


def _parquet_table(file: Path) -> Any:
    import datasets  # slow to import, and only parquet files, saved folders and the hub need it

    # streaming reads batch by batch; without it `datasets` first writes a copy of the file to its cache
    return datasets.load_dataset(
        "parquet", data_files=glob.escape(str(file.resolve())), split="train", streaming=True
    )


def _read_parquet(file: Path) -> Iterator[Row]:
    with _readable_parquet(file):
        table, _ = _stored(_parquet_table(file))
        for number, value in enumerate(table, 1):
            yield _as_row(str(file), number, _given(value, table.features))


def _saved_table(source: Any) -> Any:
    """Of a folder that save_to_disk of `datasets` wrote: one data set, or one per split."""
    import datasets  # as above

    refuse_remote_keys(source, "name", "revision")
    split = getattr(source, "split", None) or "train"
    try:
        table = datasets.load_from_disk(str(Path(source.path).expanduser()))
    except Exception as error:  # a file that is missing or broken: each library has its own kind
        raise DataError(f"not a readable save_to_disk folder: {first_line(error)}", source.path) from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise no_such_split(source, split, [str(name) for name in table])
        table = table[split]
    elif split != "train" and split != str(table.split):
        raise no_such_split(source, split, [str(table.split or "train")])
    return table


def _hub_table(source: Any, streaming: bool) -> Any:
    import datasets  # as above

    name, revision = getattr(source, "name", None), getattr(source, "revision", None)
    split = getattr(source, "split", None) or "train"
    try:
        return datasets.load_dataset(source.path, name, split=split, revision=revision, streaming=streaming)
    except (
        Exception
    ) as error:  # not found, gated, offline, wrong split or config: each library has its own kind
        raise DataError(
            f"no local file or folder, and the hub answered {type(error).__name__}: {first_line(error)}",
            source.path,
        ) from error


def _numbered(table: Any, place: str) -> Iterator[Row]:
    """The rows of a table of `datasets`."""
    import datasets  # as above

    table, pictures = _stored(table)
    pictures = pictures if isinstance(table, datasets.Dataset) else []  # a stream is not read twice
    rows = iter(table)
    number = 0
    while True:
        number += 1
        try:
            value = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the network, or a file of the data set that does not fit its schema
            raise DataError(
                f"cannot be read: {type(error).__name__}: {first_line(error)}", place, number
            ) from error
        given = _given(value, table.features)
        for name in pictures:
            if isinstance(given, dict) and isinstance(given.get(name), dict):
                given[name] = Stored(given[name], partial(_cell, table, number - 1, name))
        yield _as_row(place, number, given)


def _cell(table: Any, index: int, name: str) -> Any:
    return table[index][name]


def _given(row: Any, features: Any) -> Any:
    """A row of an Arrow table without the keys that Arrow added inside its columns: there all objects of a
    column have all keys of any of them, with null where one had none. `features`: the types of `datasets`
    (None: not known)."""
    if not isinstance(row, dict):
        return row
    return {name: _without_nulls(value, features and features.get(name)) for name, value in row.items()}


def _without_nulls(value: Any, feature: Any) -> Any:
    if isinstance(value, dict) and (feature is None or isinstance(feature, dict)):
        types = feature or {}
        return {k: _without_nulls(v, types.get(k)) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
        if feature is None or inner is not None:
            return [_without_nulls(item, inner) for item in value]
    return value  # a plain value; or what `datasets` keeps as JSON text, whose nulls are its own


READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
    ".md": _read_text,
}
