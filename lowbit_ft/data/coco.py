"""COCO's own annotation file (instances_train2017.json) as rows: pictures and boxes joined from its tables.

    {"images":      [{"id", "file_name", "width", "height"}, ...],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, width, height], "iscrowd"}, ...],
     "categories":  [{"id", "name"}, ...]}

    ->  {image, width, height, objects: {bbox, category, iscrowd}}, one for each image, in their order

Categories are said by name, so gaps between their numbers do not matter; in the order of these numbers they
are the labels, also those that no picture has. An image without annotations is a row without boxes. Boxes
keep the order that they have in the file, as in pycocotools.

A file of hundreds of megabytes is mostly polygons, which nobody reads here: entries are decoded one at a time
from a buffer, and of each only the box and three numbers stay (about 150 bytes). What is wrong with one
picture's boxes is a problem of its row; what leaves no row to blame (an id twice, an annotation of no image)
is a DataError that names the entry.
"""

from __future__ import annotations

import json
import math
import re
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from .errors import DataError, kind, told

TABLES = ("images", "annotations", "categories")
BLOCK = 1 << 20  # characters that are read at a time
MOST = 1 << 26  # characters of one entry; crowds as lists of run lengths have some 100,000
_SPACE = re.compile(r"[ \t\n\r]*")


def looks_so(file: Path) -> bool:
    """Whether a file may be one: it begins as an object, and the names of the three tables are in it. Read in
    blocks; a map of the file would count as memory."""
    wanted, before = [f'"{name}"'.encode() for name in TABLES], b""
    with open(file, "rb") as raw:
        while part := raw.read(BLOCK):
            if not before and not part.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
                return False
            wanted = [name for name in wanted if name not in before + part]
            if not wanted:
                return True
            before = (before + part)[-16:]  # a name may lie across two blocks
    return False


def rows_of(file: Path) -> Iterator[tuple[dict[str, Any] | None, str | None]] | None:
    """(value, None) or (None, problem) for each image; None where the file is no such one. DataError."""
    table = _read(file) if looks_so(file) else None
    return None if table is None else table.rows()


def categories_of(file: Path) -> list[str] | None:
    """The names of its categories in the order of their ids; None where it is no such file. DataError."""
    table = _read(file) if file.suffix.lower() == ".json" and looks_so(file) else None
    return None if table is None else table.in_order()


def pictures_of(file: Path, name: str) -> Path | None:
    """The folder in which the pictures of an annotation file lie, by one of their names: beside it, or as
    COCO is unpacked (annotations/instances_train2017.json and train2017/). None where it is in none of
    these."""
    split = file.stem.partition("_")[2] or file.stem
    beside = (file.parent, file.parent.parent)
    tried = (file.parent, *(up / part for up in beside for part in (split, f"images/{split}", "images")))
    return next((folder for folder in tried if (folder / name).is_file()), None)


@dataclass
class _Table:
    """What stays of a file. Ids (integers, or text) are numbered as they are met: `numbers` of images,
    `kinds` of categories. Of every annotation: the image, the category, the box, whether it is a crowd."""

    file: Path
    numbers: dict[Any, int] = field(default_factory=dict)
    kinds: dict[Any, int] = field(default_factory=dict)
    images: dict[int, tuple[str, int | None, int | None]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    ids: dict[Any, None] = field(default_factory=dict)  # of annotations, in their order
    image: array[int] = field(default_factory=lambda: array("q"))
    category: array[int] = field(default_factory=lambda: array("q"))
    box: array[float] = field(default_factory=lambda: array("d"))
    crowd: bytearray = field(default_factory=bytearray)
    bad: dict[int, str] = field(default_factory=dict)  # of an image, what is wrong with its first bad box

    def wrong(self, what: str) -> DataError:
        return DataError(what, str(self.file))

    def entry(self, table: str, at: int, value: Any) -> str:
        """Which entry, for messages."""
        number = value.get("id") if isinstance(value, dict) else None
        return f"{table}[{at}]" + ("" if number is None else f" (id {told(number)})")

    def id_of(self, table: str, at: int, value: Any, key: str = "id") -> Any:
        if not isinstance(value, dict):
            raise self.wrong(f"{self.entry(table, at, value)}: an entry is an object; got {kind(value)}")
        found = value.get(key)
        if isinstance(found, bool) or not isinstance(found, int | str):
            raise self.wrong(
                f"{self.entry(table, at, value)}: {key!r} must be a number (or a text) that names it; got "
                f"{told(found)}"
            )
        return found

    def add_images(self, at: int, value: Any) -> None:
        where = self.entry("images", at, value)
        one = self.numbers.setdefault(self.id_of("images", at, value), len(self.numbers))
        if one in self.images:
            raise self.wrong(f"{where}: another image has this id; give each its own")
        name = value.get("file_name")
        if not isinstance(name, str) or not name:
            raise self.wrong(f"{where}: 'file_name' must be the name of its picture; got {told(name)}")
        sides = [value.get(key) for key in ("width", "height")]
        for side in sides:
            if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 1):
                raise self.wrong(f"{where}: width and height are pixels, 1 or more; got {told(side)}")
        self.images[one] = (name, sides[0], sides[1])

    def add_categories(self, at: int, value: Any) -> None:
        where = self.entry("categories", at, value)
        one = self.kinds.setdefault(self.id_of("categories", at, value), len(self.kinds))
        name = value.get("name")
        if one in self.names:
            raise self.wrong(f"{where}: another category has this id; give each its own")
        if not isinstance(name, str) or not name:
            raise self.wrong(f"{where}: 'name' must be a text; got {told(name)}")
        self.names[one] = name

    def add_annotations(self, at: int, value: Any) -> None:
        found = self.id_of("annotations", at, value)
        if found in self.ids:
            where = self.entry("annotations", at, value)
            raise self.wrong(f"{where}: another annotation has this id; give each its own")
        self.ids[found] = None
        image = self.id_of("annotations", at, value, "image_id")
        category = self.id_of("annotations", at, value, "category_id")
        one = self.numbers.setdefault(image, len(self.numbers))
        box, crowd = value.get("bbox"), value.get("iscrowd", 0)
        if (why := _no_box(box)) is not None or crowd not in (0, 1):
            why = why or f"'iscrowd' must be 0 or 1; got {told(crowd)}"
            self.bad.setdefault(one, f"annotation {found}: {why}")
            box, crowd = [math.nan] * 4, 0
        self.image.append(one)
        self.category.append(self.kinds.setdefault(category, len(self.kinds)))
        self.box.extend(box)
        self.crowd.append(int(crowd))

    def checked(self) -> _Table:
        """Itself. DataError where the tables do not fit together."""
        if len(self.images) < len(self.numbers):  # an annotation has numbered an image that is not there
            found = next(iter(set(self.numbers.values()) - self.images.keys()))
            at = self.image.index(found)
            there = next(key for key, number in self.numbers.items() if number == found)
            where = f"annotations[{at}] (id {told(self._id(at))})"
            raise self.wrong(f"{where}: image_id {told(there)} is the id of no entry of images")
        once: dict[str, Any] = {}
        for key, number in self.kinds.items():
            if (name := self.names.get(number)) is not None and once.setdefault(name, key) != key:
                raise self.wrong(
                    f"categories {told(once[name])} and {told(key)} are both called {name!r}; give each its "
                    "own name"
                )
        if not self.names:
            raise self.wrong("categories is empty; list them with id and name")
        return self

    def _id(self, at: int) -> Any:
        return next(key for i, key in enumerate(self.ids) if i == at)

    def in_order(self) -> list[str]:
        """The names of the categories by their ids."""
        known = [key for key, number in self.kinds.items() if number in self.names]
        known.sort(key=lambda key: (isinstance(key, str), key))  # numbers first
        return [self.names[self.kinds[key]] for key in known]

    def rows(self) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
        order = sorted(range(len(self.image)), key=self.image.__getitem__)  # by image, else as in the file
        first: dict[int, int] = {}
        for place, at in enumerate(order):
            first.setdefault(self.image[at], place)
        unnamed = {number: key for key, number in self.kinds.items() if number not in self.names}
        ids = list(self.ids) if unnamed else []
        for one, (name, width, height) in self.images.items():
            place, boxes, names, crowds = first.get(one, len(order)), [], [], []
            problem = self.bad.get(one)
            while place < len(order) and self.image[at := order[place]] == one:
                if (number := self.category[at]) in unnamed:
                    got = f"annotation {ids[at]}: category_id {told(unnamed[number])}"
                    problem = problem or f"{got} is the id of no entry of categories"
                boxes.append(self.box[4 * at : 4 * at + 4].tolist())
                names.append(self.names.get(number))
                crowds.append(self.crowd[at])
                place += 1
            if problem is not None:
                yield None, f"{name}: {problem}"
                continue
            objects = {"bbox": boxes, "category": names, "iscrowd": crowds}
            sides = {k: v for k, v in (("width", width), ("height", height)) if v is not None}
            yield {"image": name, **sides, "objects": objects}, None


def finite(value: Any) -> bool:
    """Whether a value of JSON is a number that a float can be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN; an int of any length is compared as it is


def _no_box(box: Any) -> str | None:
    """Why this is no box; None when it is one."""
    numbers = box if isinstance(box, list) else []
    if len(numbers) != 4 or not all(map(finite, numbers)):
        got = str(box)[:80] if isinstance(box, list) else told(box)
        return f"'bbox' must be four finite numbers [x, y, width, height]; got {got}"
    if numbers[2] < 0 or numbers[3] < 0:  # a box that is a line is the task's business: COCO's own has some
        return f"its box {str(box)[:80]} has no size; width and height (the last two) are 0 or more"
    return None


def _read(file: Path) -> _Table | None:
    """The tables of a file; None where it has not all three of them at its top. DataError."""
    table = _Table(file)
    adds: dict[str, Callable[[int, Any], None]] = {name: getattr(table, f"add_{name}") for name in TABLES}
    seen: set[str] = set()
    try:
        with open(file, encoding="utf-8-sig") as text:
            reader = _Reader(file, text)
            for name, at, value in reader.members(TABLES):
                if at is None:
                    if not isinstance(value, list):
                        return None  # a table is a list
                    if name in seen:
                        raise table.wrong(f"it has {name!r} twice; join the two lists")
                    seen.add(name)
                else:
                    adds[name](at, value)
            return table.checked() if seen == {*TABLES} and reader.ended() else None
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: byte 0x{error.object[error.start]:02x}", str(file)) from error


class _Reader:
    """An object of JSON whose lists are read entry by entry, from a buffer that forgets what was read."""

    def __init__(self, file: Path, text: TextIO) -> None:
        self.file, self.input, self.text, self.at = file, text, "", 0
        self.decode = json.JSONDecoder().raw_decode
        self.inside = ""  # where the reader is, for messages

    def more(self) -> bool:
        """Whether there was more to read. The buffer is read on by as much as it has, so a long entry is
        looked at a few times and not once for every block."""
        left = self.text[self.at :]
        if len(left) > MOST:
            raise self.wrong(f"an entry of more than {MOST:,} characters, or one that does not end")
        part = self.input.read(max(BLOCK, len(left)))
        self.text, self.at = left + part, 0
        return bool(part)

    def wrong(self, what: str) -> DataError:
        return DataError(f"invalid JSON{self.inside}: {what}", str(self.file))

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            space = _SPACE.match(self.text, self.at)
            self.at = self.at if space is None else space.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, allowed: str) -> str:
        found = self.peek()
        if not found or found not in allowed:
            raise self.wrong(f"expected {' or '.join(allowed)}; got {found!r}" if found else "it ends early")
        self.at += 1
        return found

    def value(self) -> Any:
        if not self.peek():
            raise self.wrong("it ends early")
        while True:
            try:
                found, end = self.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.more():
                    continue
                raise self.wrong(error.msg) from error
            except (ValueError, RecursionError) as error:  # digits or nesting without end
                raise self.wrong(str(error)) from error
            if end < len(self.text) or not self.more():  # a number at the end of the buffer may go on
                self.at = end
                return found

    def members(self, tables: tuple[str, ...]) -> Iterator[tuple[str, int | None, Any]]:
        """(name, None, []) where a table begins, (name, its place, entry) for each of its entries; (name,
        None, value) for a table that is no list. Other members are passed over."""
        self.take("{")
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            name = self.value()
            if not isinstance(name, str):
                raise self.wrong(f"a key is a string; got {kind(name)}")
            self.take(":")
            if name not in tables:
                self.value()
            elif self.peek() != "[":
                yield name, None, self.value()
            else:
                yield name, None, []
                yield from self._entries(name)
            self.inside = ""
            if self.take(",}") == "}":
                return

    def _entries(self, name: str) -> Iterator[tuple[str, int, Any]]:
        self.at += 1
        at, mark = 0, ","
        if self.peek() == "]":
            self.at += 1
            return
        while mark == ",":
            self.inside = f" in {name}[{at}]"
            value = self.value()
            yield name, at, value
            mark, at = self.take(",]"), at + 1

    def ended(self) -> bool:
        """Whether nothing comes behind the object."""
        return not self.peek()
