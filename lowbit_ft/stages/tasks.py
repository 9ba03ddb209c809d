"""tasks: lm-eval on one stage after another, or on a model folder that is no run."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..evaluate.perplexity import STAGES
from ..evaluate.tasks import TaskRow, load_tasks, merged_rows, run_tasks, table
from ..export.folder import read_manifest, replace_file
from ..export.reader import load_exported, outside_torch
from ..files.records import TaskTable
from ..model.checkpoint import Checkpoint
from ..model.load import load_tokenizer
from ..rundir import shipped
from ..session import Session
from ..train.memory import release_freed
from .card import card
from .models import stage_model


def asked_tasks(session: Session, tasks: Sequence[str], stages: Sequence[str]) -> dict[str, Any]:
    """The tasks to measure, loaded: these, else the recipe's. ValueError for stages without a task, or an
    unknown stage.
    """
    names = list(tasks) or session.recipe.eval.tasks
    if stages and not names:
        raise ValueError("no task to measure: give --task, or set eval.tasks in the recipe")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise ValueError(f"stage: got {unknown[0]!r}; allowed are {', '.join(STAGES)}")
    return load_tasks(names)


def measure_tasks(
    session: Session, tasks: dict[str, Any], stages: Sequence[str] = (), limit: int | None = None
) -> None:
    """lm-eval tasks on one stage after another, each alone in memory; into tasks.json and the model cards."""
    if not tasks or not tasks["tasks"]:
        return
    recipe, run_dir = session.recipe, session.run
    stages = stages or ("base", "quantized", "trained", shipped(run_dir.path).name)
    if "exported" in stages and (run_dir / "exported").is_dir():
        refuse_tasks(run_dir / "exported")
    stored = run_dir.read_json("tasks.json", TaskTable, TaskTable())
    rows = [TaskRow(**row.model_dump()) for row in stored.rows]
    with run_dir.stage("tasks", session.device):
        for stage in stages:
            model = stage_model(session, stage)
            new = run_tasks(
                model,
                session.tokenizer,
                tasks,
                stage,
                limit=limit or recipe.eval.task_limit,
                max_length=max(2048, recipe.data.sequence_len),
            )
            del model
            release_freed()
            rows = merged_rows(rows, new)
            run_dir.write_json(
                "tasks.json", {"lm_eval": version("lm-eval"), "rows": [row.to_json() for row in rows]}
            )
    session.say(table(rows))
    for stage in ("merged", "exported"):
        if (run_dir / stage).is_dir():
            replace_file(
                run_dir / stage,
                "README.md",
                card(session, read_manifest(run_dir / stage)["format"])["README.md"],
            )


def evaluate_folder(folder: Path, tasks: Sequence[str], limit: int | None) -> None:
    """lm-eval tasks on a model folder of any of our formats (or a plain one), in its own dtype; printed."""
    if not tasks:
        raise ValueError(
            f"{folder} is not the folder of a run (no recipe.yaml in it); to measure a "
            "model folder give --task"
        )
    refuse_tasks(folder)
    loaded = load_tasks(tasks)
    model = load_exported(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    print(
        table(
            run_tasks(
                model, load_tokenizer(Checkpoint.open(folder, check=False)), loaded, folder.name, limit=limit
            )
        )
    )


def refuse_tasks(folder: Path) -> None:
    """ValueError for a folder whose reader is not transformers, which is what lm-eval measures."""
    if (name := outside_torch(folder)) is not None:
        raise ValueError(
            f"{folder}: lm-eval cannot measure an {name} folder; measure merged/ of its run "
            "(--stage merged), the equal model"
        )
