"""lm-eval tasks (https://github.com/EleutherAI/lm-evaluation-harness, extra `eval`) on the model of any
stage, as it is in memory.

A task is a name lm-eval knows (hellaswag, mmlu, ...) or a YAML file of its format. Data files that a YAML
names are looked for from the current folder, then beside the YAML, so a task and its rows can be kept
together and run without a network. Files that use lm-eval's own `include` or `!function` are handed to it as
they are.

Everything is loaded before anything is computed (`load_tasks`), and the same tasks then measure every stage:
same rows, same batches, same path through the layers (`packed_op_only`), so what was trained and what ships
must print the same numbers.
"""

import functools
import importlib
import importlib.util
import logging
import random
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..model.linear import packed_op_only
from ..names import did_you_mean
from .perplexity import STAGES

TASK_FILES = (".yaml", ".yml")
INSTALL = "lm-eval is not installed; run pip install 'lowbit-ft[eval]'"
SEED = 1234  # lm-eval's default for examples in the prompt
BATCH_TOKENS = 8192  # rows per batch times their largest length


@dataclass(frozen=True)
class TaskRow:
    """One number: a metric of a task on the model of a stage. stderr None: lm-eval has none for this
    metric.
    """

    stage: str
    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    samples: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Tags(yaml.SafeLoader):
    """YAML with lm-eval's `!function`, which is noted and not followed."""


_Tags.add_constructor("!function", lambda loader, node: _FUNCTION)
_FUNCTION = object()


def read_task(path: Path) -> dict[str, Any]:
    """The content of a task file. ValueError when it is not one."""
    try:
        content = _Tags(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as a task ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not isinstance(content.get("task"), str) or "group" in content:
        raise ValueError(
            f"{path}: needs `task: name` (one task in the YAML format of lm-eval; of a group, give the tasks)"
        )
    return content


def task_problems(names: Sequence[str]) -> list[tuple[int, str]]:
    """(index, what is wrong) for everything that is known before data is read: the package, files, names."""
    if not names:
        return []
    if importlib.util.find_spec("lm_eval") is None:
        return [(0, f"got {names[0]!r}, but {INSTALL}")]
    found, seen = [], {}
    for i, name in enumerate(names):
        own = name
        if name.lower().endswith(TASK_FILES):
            path = Path(name).expanduser()
            try:
                if not path.is_file():
                    raise ValueError("there is no such file; give a task file (YAML) or a name of lm-eval")
                config = read_task(path)
                own = config["task"]
                if _plain(config):
                    _with_data(config, path)
            except (ValueError, RecursionError) as error:  # the second: YAML that contains itself
                found.append((i, f"got {name!r}: {error}"))
                continue
        elif name not in known_tasks():
            found.append(
                (
                    i,
                    f"got {name!r}, which lm-eval {version('lm-eval')} does not "
                    f"know{did_you_mean(name, known_tasks())}; "
                    "`lm-eval ls tasks` lists the names; a file ends in .yaml",
                )
            )
            continue
        if own in seen:
            found.append(
                (
                    i,
                    f"got {name!r}, a second task named {own!r} (eval.tasks.{seen[own]} is "
                    "the first); remove one",
                )
            )
        seen.setdefault(own, i)
    return found


def known_tasks() -> list[str]:
    """Every task, group and tag that lm-eval comes with."""
    return _manager(True).all_tasks


@functools.cache
def _manager(names: bool) -> Any:
    """lm-eval's loader; with names, it has read the index of all its tasks, which takes some seconds."""
    return _lm_eval("tasks").TaskManager(include_defaults=names)


def _lm_eval(module: str = "") -> Any:
    """lm_eval or a module in it. Imported here only: it is an extra, and takes a second."""
    return importlib.import_module(f"lm_eval.{module}" if module else "lm_eval")


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's task and group objects, their data loaded. ValueError naming the task that cannot be loaded,
    or the package.
    """
    if problems := task_problems(names):
        raise ValueError("\n".join(text for _, text in problems))
    manager = _manager(not all(name.lower().endswith(TASK_FILES) for name in names))
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        spec: Any = name
        if name.lower().endswith(TASK_FILES) and _plain(config := read_task(path := Path(name).expanduser())):
            spec = _with_data(config, path)
        try:
            one = manager.load([spec])
        except Exception as error:  # datasets and hub clients raise what they like
            raise ValueError(
                f"task {name!r} cannot be loaded ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:500]})"
            ) from error
        for kind, found in loaded.items():
            found.update(one[kind])
    for task in loaded[
        "tasks"
    ].values():  # as lm_eval.simple_evaluate does, which also lists every package of the machine
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _plain(config: dict[str, Any]) -> bool:
    return "include" not in config and not _holds(config, _FUNCTION)


def _holds(value: Any, wanted: object) -> bool:
    children: Iterable[Any] = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    )
    return value is wanted or any(_holds(child, wanted) for child in children)


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
        or config.get("dataset_path") not in ("json", "csv", "parquet", "text")
    ):
        return config
    return {**config, "dataset_kwargs": {**options, "data_files": found(options["data_files"])}}


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: dict[str, Any],
    stage: str,
    *,
    limit: int | None = None,
    max_length: int = 2048,
) -> list[TaskRow]:
    """Measure one model. tasks: of `load_tasks`; limit: rows per task (None: all); max_length: tokens of
    context at most.

    A group that lm-eval averages is one row; its members are not listed then.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or max_length
    length = min(max_length, positions)
    logger, training = logging.getLogger("lm_eval"), model.training
    level = logger.level
    with ExitStack() as stack, warnings.catch_warnings():
        stack.callback(logger.setLevel, level)
        logger.setLevel(logging.ERROR)  # it warns that a model in memory ignores options we do not give
        stack.callback(model.train, training)
        stack.enter_context(packed_op_only(model))
        model.eval()
        lm = _lm_eval("models.huggingface").HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=max(1, BATCH_TOKENS // length),
            max_length=length,
        )
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(seed=SEED)
        stack.callback(random.setstate, random.getstate())
        random.seed(SEED)  # some tasks shuffle their answers with it: every stage sees the same order
        done: Any = _lm_eval().evaluate(
            lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=100, log_samples=False
        )
    averaged = done.get("groups") or {}
    members = {child for group in averaged for child in done.get("group_subtasks", {}).get(group, [])}
    rows = []
    for task, metrics in {**done["results"], **averaged}.items():
        if task in members or (task in done.get("group_subtasks", {}) and task not in averaged):
            continue
        higher, samples = (
            done.get("higher_is_better", {}).get(task, {}),
            done.get("n-samples", {}).get(task, {}).get("effective"),
        )
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or isinstance(value, str):
                continue
            stderr = metrics.get(f"{name}_stderr,{kind}")
            rows.append(
                TaskRow(
                    stage,
                    task,
                    name if kind == "none" else f"{name} ({kind})",
                    float(value),
                    None if stderr is None or isinstance(stderr, str) else float(stderr),
                    higher.get(name),
                    samples,
                )
            )
    return rows


def merged_rows(before: list[TaskRow], new: list[TaskRow]) -> list[TaskRow]:
    """All rows in the order of the stages; those measured again replace the old ones of the same stage and
    task.
    """
    again = {(row.stage, row.task) for row in new}
    kept = [row for row in before if (row.stage, row.task) not in again]
    return sorted(kept + new, key=lambda row: STAGES.index(row.stage))


def by_task(rows: Iterable[TaskRow]) -> tuple[list[str], dict[tuple[str, str], dict[str, TaskRow]]]:
    """(stages in the order they came, {(task, metric): {stage: row}}). Rows measured on another number of
    samples (`--limit`) are another line, with the number beside the metric: they are not to be compared."""
    rows = list(rows)
    counts: dict[tuple[str, str], set[int | None]] = {}
    for row in rows:
        counts.setdefault((row.task, row.metric), set()).add(row.samples)
    table: dict[tuple[str, str], dict[str, TaskRow]] = {}
    for row in rows:
        several = len(counts[row.task, row.metric]) > 1
        metric = f"{row.metric} ({row.samples or '?'} rows)" if several else row.metric
        table.setdefault((row.task, metric), {})[row.stage] = row
    return list(dict.fromkeys(row.stage for row in rows)), table


def table(rows: list[TaskRow]) -> str:
    """The printed table: a line per metric, a column per stage."""
    stages, lines = by_task(rows)
    width = max(len(f"{task} {metric}") for task, metric in lines) + 2
    text = [" " * width + "".join(f"{stage:>14}" for stage in stages)]
    for (task, metric), values in lines.items():
        cells = "".join(f"{values[s].value:>14.6g}" if s in values else f"{'':>14}" for s in stages)
        text.append(f"{f'{task} {metric}':<{width}}{cells}")
    return "\n".join(text)
