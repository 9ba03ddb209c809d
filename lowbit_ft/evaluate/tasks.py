"""lm-eval tasks (https://github.com/EleutherAI/lm-evaluation-harness, extra `eval`) on the model of any
stage, as it is in memory.

A task is a name lm-eval knows (hellaswag, mmlu, ...) or a YAML file of its format, which is read without
running code (task_files.py). Data files that a YAML names are looked for from the current folder, then
beside the YAML, so a task and its rows can be kept together and run without a network.

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

from ..model.linear import packed_op_only
from ..names import did_you_mean
from .perplexity import STAGES
from .task_files import read_task, refuse_metrics, templates_in_sandbox

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
                own = _own_task(path)["task"]
            except ValueError as error:
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


def _own_task(path: Path) -> dict[str, Any]:
    """The task in a file, all that it needs looked at. ValueError saying what is wrong with it."""
    config = read_task(path)
    _lm_eval("api.metrics")  # which fills the registry
    refuse_metrics(config, path, _lm_eval("api.registry").metric_registry)
    return config


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
    or the package. Nothing, and no lm-eval, for no names.
    """
    if not names:
        return {}
    if problems := task_problems(names):
        raise ValueError("\n".join(text for _, text in problems))
    manager = _manager(not all(name.lower().endswith(TASK_FILES) for name in names))
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        spec: Any = name
        if name.lower().endswith(TASK_FILES):
            spec = _own_task(Path(name).expanduser())
        try:
            with templates_in_sandbox():
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
        stack.enter_context(templates_in_sandbox())
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
