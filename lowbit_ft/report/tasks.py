"""The lm-eval tasks of the report page: what tasks.json holds, one column per stage."""

from typing import Any

from .files import DIGITS, SHIPPED, STAGES, NotShown, RunFiles
from .html import is_number, note, number, plain, table


def tasks_section(run: RunFiles) -> str:
    """A line per metric, a column per stage. NotShown when no task was measured."""
    missing = "No lm-eval task was measured (eval.tasks, or lowbit-ft eval --task)"
    data = run.json("tasks.json", missing, dict)
    found = data.get("rows")
    rows = (
        [r for r in found if isinstance(r, dict) and is_number(r.get("value"))]
        if isinstance(found, list)
        else []
    )
    if not rows:
        raise NotShown(f"{missing} (tasks.json has no rows).")
    stages = [
        s for s in [*STAGES, *(str(r.get("stage")) for r in rows)] if any(r.get("stage") == s for r in rows)
    ]
    stages = list(dict.fromkeys(stages))
    lines, differ = [], []

    def key(row: dict[str, Any]) -> tuple[str, str, str]:
        return str(row.get("task")), str(row.get("metric")), str(row.get("samples", "?"))

    keys = list(dict.fromkeys(map(key, rows)))
    for task, metric, samples in keys:
        same = {str(r.get("stage")): r for r in rows if key(r) == (task, metric, samples)}
        if [k[:2] for k in keys].count((task, metric)) > 1:  # another number of rows is not to be compared
            metric = f"{metric} ({samples} rows)"
        better = next((r.get("higher_is_better") for r in same.values()), None)
        cells = []
        for stage in stages:
            row = same.get(stage, {})
            error = f" ± {number(row['stderr'], DIGITS)}" if is_number(row.get("stderr")) else ""
            cells.append(f"{number(row.get('value'), DIGITS)}{error}")
        lines.append(
            [task, metric, "higher" if better is True else "lower" if better is False else "", *cells]
        )
        if len({same[stage]["value"] for stage in SHIPPED if stage in same}) > 1:
            differ.append(f"{task} {metric}")
    text = (
        f"Measured by lm-eval {plain(data.get('lm_eval'))}; ± is the standard error over "
        "the rows of the task."
    )
    if differ:
        text += f" What ships differs from what was trained in {', '.join(differ)}."
    return table(["task", "metric", "better", *(STAGES.get(s, s) for s in stages)], lines, words=3) + note(
        text
    )
