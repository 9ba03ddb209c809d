"""YAML that remembers where everything stood.

A recipe error is useful when it names the line, so the file is read as a tree of YAML nodes (PyYAML's safe
loader, composing only) and turned into plain dicts and lists here, noting the line of every key path on the
way. What a recipe never needs is refused: two keys of the same name, keys that are not text, tags that
build objects, merge keys, aliases that contain themselves or expand without end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..files.regular import read_regular
from ..files.shallow_yaml import ShallowLoader
from ..names import did_you_mean

KeyPath = tuple[str | int, ...]

MAX_NODES = 100_000  # an alias bomb of 1 kB expands to 10^9 values; the longest real recipe has a few hundred
MAX_DEPTH = 50
MAX_BYTES = 1 << 18
MOST_PROBLEMS = 100  # told of one section: nobody reads more, and each looks for the word that was meant


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: the key path it is about, and the message (got; allowed; did you mean;
    fix).
    """

    path: KeyPath
    message: str

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.message}" if self.path else self.message


class RecipeError(ValueError):
    """Everything wrong with a recipe at once: `str()` has one line per problem, `problems` has the lines as a
    list.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass
class Source:
    """Plain values read from a recipe file, and where each came from (`file:line`, or the override that set
    it).
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """The place of `path`, or of the nearest key above it that was written down."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return f"{self.name}:1"

    def lines(self, problems: Iterable[Problem]) -> list[str]:
        """The lines of a RecipeError (place: key path: message), in the order of the file, overrides last,
        none twice.
        """
        lines = self.problems + [f"{self.place(problem.path)}: {problem}" for problem in problems]
        return sorted(dict.fromkeys(lines), key=self._line_number)

    def _line_number(self, line: str) -> float:
        number = line.removeprefix(f"{self.name}:").partition(":")[0]
        return int(number) if line.startswith(f"{self.name}:") and number.isdecimal() else float("inf")


def dotted(path: Iterable[str | int]) -> str:
    """('data', 'train', 0) -> 'data.train.0', with control characters made visible."""
    return ".".join(str(part) if str(part).isprintable() else repr(part) for part in path)


def read_source(path: Path) -> Source:
    """Read a recipe file.

    Raises:
        FileNotFoundError: there is no such file.
        RecipeError: it is not UTF-8 text, not YAML, or not a mapping. Problems that leave a usable rest are
        in `.problems`.
    """
    source = Source(str(path))
    try:
        data = read_regular(path, MAX_BYTES)
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else Path(".")
        others = sorted(p.name for p in folder.glob("*.y*ml"))
        raise FileNotFoundError(f"no recipe at {path}{did_you_mean(path.name, others)}") from None
    except OSError as error:
        raise RecipeError(
            [f"{path}: cannot be read: {error.strerror}; give the path of a recipe YAML"]
        ) from None
    except ValueError as error:  # too long, or a pipe or a device
        raise RecipeError([f"{error}; give the path of a recipe YAML"]) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(
            [f"{path}:{line}: got byte {data[error.start]:#04x}, not UTF-8 text; save it as UTF-8"]
        ) from None
    try:
        node = _compose(text)
        reader = _Reader(source)
        value = {} if node is None else reader.plain(node, ())
    except yaml.YAMLError as error:
        raise RecipeError([_yaml_message(source.name, error)]) from None
    except RecursionError:
        raise RecipeError([f"{path}: nested too deep; a recipe has at most {MAX_DEPTH} levels"]) from None
    if not isinstance(value, dict):
        got = f"a {type(value).__name__}"
        raise RecipeError(
            [f"{path}:1: got {got}; a recipe is a mapping of sections: name, model, quant, adapter, ..."]
        )
    source.values = value
    return source


def apply_override(source: Source, text: str) -> None:
    """Set one `a.b=value` (value is YAML) in `source`, creating the sections it goes through; problems are
    noted there.
    """
    place = f"override {text!r}"
    key, equals, value_text = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        source.problems.append(f"{place}: got no key.path=value; write for example train.max_steps=100")
        return
    inner = Source(place)
    try:
        node = _compose(value_text)
        value = None if node is None else _Reader(inner).plain(node, ())
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "not YAML"
        source.problems.append(
            f"{place}: got {value_text!r}, which is not YAML ({problem}); put the value in quotes"
        )
        return
    except RecursionError:
        source.problems.append(f"{place}: nested too deep; a recipe has at most {MAX_DEPTH} levels")
        return
    source.problems += inner.problems
    rest = value_text if node is None else value_text[node.end_mark.index :]
    if rest.lstrip().startswith("#"):  # on a command line nobody comments, and folders have such names
        source.problems.append(
            f"{place}: got {rest.strip()!r}, which is a comment in YAML and would be left out; put the value "
            "in quotes that the shell leaves: 'key=\"value\"'"
        )
        return

    path: list[str | int] = []
    target: Any = source.values
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            if not part.isdecimal() or len(part) > 9 or int(part) >= len(target):
                allowed = f"0..{len(target) - 1}" if target else "nothing, it is empty"
                source.problems.append(
                    f"{place}: {dotted(path)} is a list: got index {part!r}; allowed {allowed}"
                )
                return
            step: str | int = int(part)
        elif isinstance(target, dict):
            step = part
            if not last and target.get(part) is None:
                target[part] = {}
        else:
            source.problems.append(
                f"{place}: {dotted(path)} is {target!r}, a value without keys; set {dotted(path)}=..."
            )
            return
        path.append(step)
        if last:
            target[step] = value  # type: ignore[index] - an int for a list, a str for a dict, by the branch above
        else:
            target = target[step]  # type: ignore[index]
    where = tuple(path)
    for old in [p for p in source.places if p[: len(where)] == where]:
        del source.places[old]
    source.places[where] = place


def _compose(text: str) -> yaml.Node | None:
    loader = ShallowLoader(text)  # composes only: no tag builds anything here
    try:
        return loader.get_single_node()
    except (
        ValueError,
        OverflowError,
        IndexError,
    ) as error:  # PyYAML lets these through, for example for "\UFFFFFFFF"
        raise yaml.MarkedYAMLError(
            problem=f"a value that cannot be read ({error})", problem_mark=loader.get_mark()
        ) from None
    finally:
        loader.dispose()


def _yaml_message(name: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:  # a character YAML does not allow
        return f"{name}: not YAML: {' '.join(str(error).split())}"
    problem = getattr(error, "problem", None) or "not YAML"
    context = getattr(error, "context", None)
    hint = "; use spaces, not tabs" if "\\t" in problem else "; check quotes, colons and indentation"
    return f"{name}:{mark.line + 1}: not YAML: {problem}{f' {context}' if context else ''}{hint}"


class _Reader:
    """Node tree -> plain values, filling `source.places` and `source.problems`."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.nodes = 0
        self.open: set[int] = (
            set()
        )  # ids of the collections we are inside of: an alias to one of them never ends
        self.scalars = yaml.SafeLoader("")

    def problem(self, node: yaml.Node, path: KeyPath, message: str) -> None:
        name = self.source.name
        place = name if name.startswith("override ") else f"{name}:{node.start_mark.line + 1}"
        self.source.problems.append(f"{place}: {Problem(path, message)}")

    def plain(self, node: yaml.Node, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_NODES} values (aliases included)", problem_mark=node.start_mark
            )
        if len(path) > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=node.start_mark
            )
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if id(node) in self.open:
            raise yaml.MarkedYAMLError(problem="an alias that contains itself", problem_mark=node.start_mark)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.item(child, (*path, i)) for i, child in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode)
            return self.mapping(node, path)
        finally:
            self.open.discard(id(node))

    def item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.source.places[path] = f"{self.source.name}:{node.start_mark.line + 1}"
        return self.plain(node, path)

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        kind = node.tag.rpartition(":")[2]
        if node.tag.startswith("tag:yaml.org,2002:") and kind in {"null", "bool", "int", "float", "str"}:
            try:
                return self.scalars.construct_object(node)
            except (ValueError, KeyError, IndexError, OverflowError, yaml.YAMLError):
                self.problem(
                    node,
                    path,
                    f"got {node.value[:60]!r}, which is not a readable {kind}; put it in "
                    "quotes if it is text",
                )
                return None
        if kind in {"timestamp", "value"} and node.tag.startswith("tag:yaml.org,2002:"):
            return node.value  # a run named 2026-11-21 is text to us
        self.problem(
            node,
            path,
            f"got the tag {node.tag!r}; a recipe holds text, numbers, true/false, null, "
            "lists and mappings only",
        )
        return None

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(key_node, path, "got a list or mapping as a key; keys are plain words")
                continue
            if key_node.tag == "tag:yaml.org,2002:merge":
                self.problem(
                    key_node, path, "got '<<'; merge keys are not allowed in a recipe; write the keys out"
                )
                continue
            key = key_node.value
            here = (*path, key)
            if key in result:
                first = self.source.places[here].rpartition(":")[2]
                self.problem(key_node, here, f"got the key twice (first on line {first}); keep one")
                continue
            self.source.places[here] = f"{self.source.name}:{key_node.start_mark.line + 1}"
            result[key] = self.plain(value_node, here)
        return result
