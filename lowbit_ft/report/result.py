"""The result of a run: the table of its stages, the few numbers on top, and whether what ships is what was
trained.

A language model is judged by perplexity and KL; another task by its loss and its scores, whatever they are
called in evaluation.json."""

from __future__ import annotations

from typing import Any

from .files import DIGITS, SHIPPED, STAGES, NotShown, RunFiles, values
from .html import duration, is_number, note, number, table


def scores_of(row: dict[str, Any]) -> dict[str, float]:
    """What a task measures beside the loss."""
    found = row.get("scores")
    return {str(k): v for k, v in found.items() if is_number(v)} if isinstance(found, dict) else {}


SLACK = 0.005  # of a score: sums in another order let two answers change places that are equally sure


def measure_of(rows: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """By which number of a row stages are compared, and its plural: of a task with scores the loss, or, where
    a reader computes none, the first score."""
    scores = [name for row in rows.values() for name in scores_of(row)]
    if not scores:
        return "perplexity", "perplexities"
    known = all(is_number(rows[stage].get("loss")) for stage in SHIPPED if stage in rows)
    return ("loss", "losses") if known else (scores[0], f"values of {scores[0]}")


def verdict_of(run: RunFiles, recipe: dict[str, Any]) -> tuple[str, str]:
    """("good" all equal | "bad" they differ | "open" not known) and the sentence on top of the page.

    In the native format nothing is exported: the merged model is what ships.
    """
    export = recipe.get("export")
    native = isinstance(export, dict) and export.get("format") == "native"
    shipped = [stage for stage in SHIPPED if not (native and stage == "exported")]
    try:
        rows = run.evaluation()
    except NotShown:
        return (
            "open",
            "Not shown: the evaluation did not run, so trained, merged and exported are not compared.",
        )
    name, plural = measure_of(rows)
    found = {stage: (row := rows.get(stage, {})).get(name, scores_of(row).get(name)) for stage in shipped}
    printed = {stage: number(value, DIGITS) for stage, value in found.items() if is_number(value)}
    if len(set(printed.values())) > 1:
        if _nearly(rows, found):
            return "good", (
                f"What was trained is what ships: trained = merged {name} = {printed['trained']}. Exported "
                f"has {printed['exported']}, computed by another library, whose sums round differently."
            )
        listed = ", ".join(f"{stage} {value}" for stage, value in printed.items())
        return "bad", f"What ships is not what was trained: the {plural} differ ({listed})."
    if missing := [stage for stage in shipped if stage not in printed]:
        return "open", f"Not shown: no {name} of the {' and the '.join(missing)} model to compare with."
    return "good", f"What was trained is what ships: {' = '.join(shipped)} {name} = {printed['trained']}."


def _nearly(rows: dict[str, dict[str, Any]], found: dict[str, Any]) -> bool:
    """Whether only a reader that computes no loss is apart, by no more than SLACK of its score."""
    own = "exported" in rows and not is_number(rows["exported"].get("loss"))
    if not own or not all(map(is_number, found.values())) or found["trained"] != found["merged"]:
        return False
    return abs(found["exported"] - found["trained"]) <= SLACK


AS_IT_CAME = "as it came, quantized"


def _reference(run: RunFiles) -> str:
    """What the row "base" is: the full-precision model, or a checkpoint that came quantized."""
    quant = run.recipe().get("quant")
    came = isinstance(quant, dict) and quant.get("calibrate") == "from_checkpoint"
    return AS_IT_CAME if came else STAGES["base"]


def headline(run: RunFiles) -> list[tuple[str, str]]:
    """The few numbers a reader wants first; each is left out where its file is."""
    facts = []
    try:
        rows = run.evaluation()
        for stage, label in (
            ("base", _reference(run)),
            ("quantized", "quantized only"),
            ("exported", "shipped"),
        ):
            row = rows.get(stage, {})
            name, value = next(iter(scores_of(row).items()), ("perplexity", row.get("perplexity")))
            if is_number(value):
                facts.append((f"{label}, {name}", number(value, 3)))
    except NotShown:
        facts.clear()
    try:
        rows = run.rows("stages.json", "")
        facts.append(("total time", duration(sum(values(rows, "seconds")))))
        if peaks := values(rows, "peak_memory_gb"):
            facts.append(("peak memory", f"{max(peaks):.2f} GB"))
    except NotShown:
        return facts
    return facts


def result_section(run: RunFiles) -> str:
    rows = run.evaluation()
    data = run.json("evaluation.json", "", dict)
    if any(scores_of(row) for row in rows.values()):
        return _scored(run, rows, data)
    base = rows.get("base", {}).get("perplexity")
    reference = _reference(run)
    lines = []
    for stage, row in rows.items():
        perplexity = row.get("perplexity")
        change = "–"  # of the reference itself too
        if stage != "base" and is_number(perplexity) and is_number(base) and base > 0:
            change = f"{100 * (perplexity / base - 1):+.2f} %"
        loss, kl = number(row.get("loss"), DIGITS), number(row.get("kl"), 5)
        name = reference if stage == "base" else STAGES.get(stage, stage)
        lines.append([name, number(perplexity, DIGITS), change, loss, kl])
    text = (
        "Perplexity is e to the mean loss per target token. KL is the mean divergence from the model "
        f"{reference}, in nats per token."
        if reference == AS_IT_CAME
        else "Perplexity is e to the mean loss per target token. KL is the mean divergence from the "
        "full-precision model, in nats per token."
    )
    if is_number(data.get("windows")) and is_number(data.get("window")):
        text = f"On {number(data['windows'])} windows of {number(data['window'])} tokens. {text}"
    return table(["model", "perplexity", f"against {reference}", "loss", "KL"], lines) + note(text)


def _scored(run: RunFiles, rows: dict[str, dict[str, Any]], data: dict[str, Any]) -> str:
    """The table of a task that has scores."""
    reference = _reference(run)
    names = list(dict.fromkeys(name for row in rows.values() for name in scores_of(row)))
    lines = [
        [
            reference if stage == "base" else STAGES.get(stage, stage),
            *(number(scores_of(row).get(name), DIGITS) for name in names),
            number(row.get("loss"), DIGITS),
        ]
        for stage, row in rows.items()
    ]
    counts = {row.get("tokens") for row in rows.values() if is_number(row.get("tokens"))}
    text = f"On {number(data.get('windows'))} examples"
    text += f" with {number(counts.pop())} answers." if len(counts) == 1 else "."
    return table(["model", *names, "loss"], lines) + note(text)
