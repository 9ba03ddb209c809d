"""A task file: YAML in lm-eval's format, from anybody, read without running code.

lm-eval's own reader imports what `!function` names, templates are Jinja that reaches Python's objects, and
some keys name code: the class of a task, a data set made by a function, a metric or a `generate` that is
fetched and run. No key of a recipe runs code, so none of it is followed here: tags and such keys are refused
with their line, a metric must be one that lm-eval has itself, and templates are rendered in Jinja's sandbox
(`templates_in_sandbox`). Tasks that lm-eval comes with, asked for by name, are its own code.

`include` means what it means there: the file it names is read the same way, from beside the file that
includes it, and what the includer says wins.
"""

import importlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..files.jsonfile import read_bytes
from ..files.shallow_yaml import ShallowLoader
from ..names import did_you_mean

# Keys whose value is code, wherever they stand in a task: a class, a function, a module that is fetched.
CODE_KEYS = ("class", "custom_dataset", "custom_generate", "trust_remote_code", "hf_evaluate", "unsafe_code")
DATA_READERS = ("json", "csv", "parquet", "text")  # of the data sets library, for files
MAX_BYTES = 1 << 20  # of a task file
_PLAIN = "tag:yaml.org,2002:"
_MERGE = _PLAIN + "merge"


def read_task(path: Path) -> dict[str, Any]:
    """The content of a task file, what it includes merged in. ValueError, with the line, when it is not one,
    or would run code."""
    content = _read(path, [])
    if not isinstance(content.get("task"), str) or "group" in content:
        raise ValueError(
            f"{path}: needs `task: name` (one task in the YAML format of lm-eval; of a group, give the tasks)"
        )
    return content


def _read(path: Path, above: list[Path]) -> dict[str, Any]:
    if path.resolve() in above:
        raise ValueError(f"{path}: includes itself")
    try:
        loader = ShallowLoader(read_bytes(path, limit=MAX_BYTES).decode())
        node = loader.get_single_node()
        if node is not None:
            _refuse_code(node, path, ())
        content = None if node is None else loader.construct_document(node)
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as a task ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: needs `task: name`; got a YAML {type(content).__name__}")
    included = content.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str):
            raise ValueError(f"{path}: include holds {name!r}; needs names of files")
        merged |= _with_data(_read(path.parent / name, [*above, path.resolve()]), path.parent / name)
    return merged | _with_data(content, path)


def _refuse_code(node: yaml.Node, path: Path, above: tuple[yaml.Node, ...]) -> None:
    """ValueError for the first tag or key under `node` that stands for code."""
    if any(node is other for other in above):
        raise ValueError(f"{path}:{node.start_mark.line + 1}: a value that contains itself (recursion)")
    tag = node.tag
    if not tag.startswith(_PLAIN) or tag.startswith(_PLAIN + "python"):
        said = "!!" + tag[len(_PLAIN) :] if tag.startswith(_PLAIN) else tag
        said += f" {node.value}" if isinstance(node, yaml.ScalarNode) and node.value else ""
        raise ValueError(
            f"{path}:{node.start_mark.line + 1}: {said} is Python code, and no code of a task file is run; "
            "say it in YAML, or have `lm-eval` itself measure this task"
        )
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_code(child, path, (*above, node))
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _refuse_code(key, path, (*above, node))
            if isinstance(key, yaml.ScalarNode) and key.value in CODE_KEYS and not _is_off(value):
                raise ValueError(
                    f"{path}:{key.start_mark.line + 1}: {key.value} runs code, and no code of a task file is "
                    "run; remove it"
                )
            _refuse_code(value, path, (*above, node))


def _is_off(node: yaml.Node) -> bool:
    return node.tag in (_PLAIN + "bool", _PLAIN + "null") and str(node.value).lower() in (
        "", "~", "null", "false", "no", "off",
    )  # fmt: skip


def refuse_metrics(config: dict[str, Any], path: Path, known: Collection[str]) -> None:
    """ValueError for a metric that lm-eval does not have: it would fetch one of that name and run it."""
    listed = config.get("metric_list") or []
    for entry in listed if isinstance(listed, list) else [listed]:
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if not isinstance(name, str) or name not in known:
            raise ValueError(
                f"{path}: metric_list has {name!r}, which lm-eval would fetch as code; allowed are its own "
                f"metrics: {', '.join(sorted(known))}{did_you_mean(str(name), known)}"
            )


@contextmanager
def templates_in_sandbox() -> Iterator[None]:
    """lm-eval renders the templates of tasks (doc_to_text, ...) in an environment of its module; for as long
    as this is open that is Jinja's sandbox, in which a template reaches values and not Python."""
    from jinja2 import BaseLoader, StrictUndefined  # here: it comes with the extra
    from jinja2.sandbox import SandboxedEnvironment

    utils: Any = importlib.import_module("lm_eval.utils")
    before = utils.env
    sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(before.filters)
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = before


def _with_data(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The task with data files that only exist beside its YAML given from there. ValueError for one that is
    nowhere.
    """

    def found(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: found(child) for key, child in value.items()}
        if isinstance(value, list):
            return [found(child) for child in value]
        if not isinstance(value, str):
            raise ValueError(f"its data_files hold {value!r}; needs names of files")
        if "://" in value or any(c in value for c in "*?["):
            return value
        for candidate in (Path(value).expanduser(), path.parent / value):
            if candidate.is_file():
                return str(candidate)
        raise ValueError(f"its data file {value!r} is neither here nor beside {path}")

    options = config.get("dataset_kwargs")
    if (
        not isinstance(options, dict)
        or not options.get("data_files")
        or config.get("dataset_path") not in DATA_READERS
    ):
        return config
    return {**config, "dataset_kwargs": {**options, "data_files": found(options["data_files"])}}
