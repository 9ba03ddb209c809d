"""JSON that somebody else wrote, or that was edited since: read once, bounded, and of the shape that was
asked.

Every JSON of a run folder and of a checkpoint comes through `read_json`: a regular file, no larger than a
bound, UTF-8, no deeper than MAX_DEPTH, and then what a pydantic model (or any type that pydantic knows) says
it is. Whatever is wrong is one ValueError that names the file and the first thing that is wrong in it.

NaN and Infinity pass, as Python's json writes them: configurations of transformers have them
(`time_step_limit`), and so has the loss of a run that diverged. A shape that cannot have them says so.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, TypeVar, overload

from pydantic import TypeAdapter, ValidationError

from .regular import read_regular

T = TypeVar("T")

MAX_BYTES = 64 << 20  # the largest JSON of a published checkpoint is a tokenizer.json of some 35 MB
# Levels of lists and objects. Whoever walks a value again (json.dumps, pydantic, transformers) recurses, some
# frames per level, and Python stops at 1000.
MAX_DEPTH = 64
_LONGEST = 60  # characters of a wrong value that are shown


@overload
def read_json(path: Path, shape: type[T], fix: str = "", limit: int = MAX_BYTES) -> T: ...
@overload
def read_json(path: Path, shape: Any = Any, fix: str = "", limit: int = MAX_BYTES) -> Any: ...
def read_json(path: Path, shape: Any = Any, fix: str = "", limit: int = MAX_BYTES) -> Any:
    """The content of a JSON file as `shape` (a pydantic model, `dict[str, Any]`, `list[Row]`, ...).

    fix: what to do when the file is missing or cannot be read, for the message. ValueError for everything
    that is wrong, a missing file included.
    """
    return parse_json(read_bytes(path, fix, limit), str(path), shape)


def read_bytes(path: Path, fix: str = "", limit: int = MAX_BYTES) -> bytes:
    """The bytes of such a file, for who compares them, or reads YAML of them. ValueError as `read_json`."""
    end = f"; {fix}" if fix else ""
    try:
        return read_regular(path, limit)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing{end}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}){end}") from None


def parse_json(data: bytes, where: str, shape: Any = Any) -> Any:
    """JSON text as `shape`; `where` names it in the ValueError."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not JSON (byte {data[error.start]:#04x} is not UTF-8)") from None
    except RecursionError:
        raise ValueError(f"{where}: not readable JSON (nested deeper than {MAX_DEPTH} levels)") from None
    except ValueError as error:
        text = str(error) if isinstance(error, json.JSONDecodeError) else "a number of thousands of digits"
        raise ValueError(f"{where}: not JSON ({text}); the file is cut or damaged") from None
    if (problem := _bounded(value)) is not None:
        raise ValueError(f"{where}: not readable JSON ({problem})")
    return value if shape is Any else as_shape(value, shape, where)


def as_shape(value: Any, shape: Any, where: str) -> Any:
    """A JSON value as `shape`. ValueError with `where`, the key, what was got and what is allowed."""
    try:
        return _adapter(shape).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{where}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """The first thing wrong with a JSON value, in our words: key: got; allowed."""
    detail = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in detail["loc"] if not str(part).startswith("function-"))
    place = f"{key}: " if key else ""
    if detail["type"] == "missing":
        return f"{place}missing"
    if detail["type"] == "extra_forbidden":
        return f"{place}unknown key"
    allowed = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    for ours, theirs in (
        ("an object", "a valid dictionary or instance of "),
        ("an object", "a valid dictionary"),
        ("an integer", "a valid integer"),
        ("text", "a valid string"),
        ("true or false", "a valid boolean"),
        ("a ", "a valid "),
    ):
        if allowed.startswith(theirs):
            allowed = ours + ("" if theirs.endswith(" of ") else allowed.removeprefix(theirs))
            break
    return f"{place}got {shown(detail['input'])}; allowed: {allowed}"


def shown(value: Any) -> str:
    """A JSON value for a message, cut to a readable length; a large one by its kind."""
    if isinstance(value, dict | list):
        return f"a JSON {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


@functools.lru_cache(maxsize=64)
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _bounded(value: Any) -> str | None:
    """Why a value is not fit to be walked and written again: too deep, or text that is no Unicode; else None.
    Without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    if _lone(key):
                        return "a key has half a surrogate pair"
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif isinstance(item, str) and _lone(item):
                return "a text has half a surrogate pair"
        if not inner:
            return None
        level = inner
    return f"nested deeper than {MAX_DEPTH} levels"


def _lone(text: str) -> bool:
    """Whether the text cannot be written in UTF-8."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
