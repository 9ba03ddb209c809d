"""eval: what is measured at the end, and whether the tasks can be."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ...evaluate.tasks import task_problems
from ...export import EXPORTERS
from ..yaml import Problem
from .base import Count, Problems, Section
from .data import DataSource


class EvalSection(Section):
    """What is measured at the end."""

    perplexity: bool = Field(
        default=True, description="perplexity of base, quantized, trained, merged, exported"
    )
    data: DataSource | None = Field(default=None, description="rows to measure on; null: data.valid")
    windows: Count | None = Field(
        default=64, description="windows (of a task with rows: rows, all of them) measured; null: all"
    )
    window: Annotated[int, Field(ge=8)] = Field(default=256, description="tokens per window")
    kl: bool = Field(
        default=True,
        description="also the KL divergence to the full-precision model, which is loaded again for it",
    )
    tasks: list[str] = Field(
        default=[], description="lm-eval tasks: names, or YAML files of its format (extra: eval)"
    )
    task_limit: Count | None = Field(default=None, description="rows measured of each task; null: all")
    generate: list[str] = Field(default=[], description="prompts answered before and after training")
    max_new_tokens: Count = Field(default=48, description="tokens per answer")


def check_tasks(r: Any) -> Problems:
    """lm-eval tasks: the package, names it does not know, files that are not there."""
    for i, text in task_problems(r.eval.tasks):
        yield Problem(("eval", "tasks", i), text)


def check_tasks_reader(r: Any) -> Problems:
    """lm-eval measures models of transformers; some formats are read by another library, or by one that is
    not here."""
    exporter = EXPORTERS[name := r.export.format]
    reason = exporter.missing(exporter.reads_with)
    if r.eval.tasks and (reason is not None or not exporter.measurable):
        because = f", whose reader {reason}" if exporter.measurable else ""
        yield Problem(
            ("eval", "tasks"),
            f"lm-eval cannot measure an export.format {name}{because}; set export.format: native, which "
            "measures merged/, the equal model, "
            f"and write {name} afterwards with `lowbit-ft export RUN --format {name}`; or remove the tasks",
        )
