"""One run as one page: `write_report` reads what the stages left in a run directory and writes report.html.

The page is self-contained (style inside, pictures as data URIs, no script), so it opens from disk or a mail,
and in ten years. It never invents: a section whose file is missing says what was not run, a file that cannot
be read says so, and the rest of the page stands. What the recipe did not ask for has no section. Every text
from a run is HTML-escaped.

    file              what is read from it
    recipe.yaml       shown whole; `name` is the title
    evaluation.json   {"rows": [{"stage", "perplexity", "kl", "loss"}], "windows", "window"}
    tasks.json        {"rows": [{"stage", "task", "metric", "value", "stderr", "higher_is_better",
                      "samples"}]}
    metrics.jsonl     {"step", "loss", "lr", "scale_lr", "tokens", "tokens_per_s", "memory_gb"} and
                      {"step", "valid_loss"}; of pairs also {"rewards/accuracies", "rewards/margins"};
                      instead of tokens what the task counts (images, sound_seconds)
    kv_cache.json     {"grid", "bytes", "dense"}: of a token in all layers, as cached and in 16 bits
    activations.json  {"rows": [{"layers", "scheme", "error", "tried", "why"}]}: what inputs are on
    base/rotation.json  {"r1", "r2", "r3", "r4", "errors", "alphas"}: what was turned before packing
    teacher.json      {"kl", "student_kl"} to full precision, where the teacher is a model
    quant.json        [{"layer", "action", "reason", "bits", "group_size", "error", "parameters"}]
    zeros.json        {"zeros": share, "layers": {layer: counts}}: pruned while it trained
    moved.json        {layer: share of its codes that training changed, "scale_change": mean |s/s0 - 1|}
    trainable.json    a list of rows, or an object of facts with its list under "rows"
    stages.json       [{"stage", "seconds", "peak_memory_gb"}]
    samples.json      [{"prompt", "before", "after"}]
    boxes.json        {"names", "confidence", "pictures": [{"image": PNG in base64, "boxes": {stage: [[x0, y0,
                      x1, y1, category, score]]}}]}: what a detector found; stage true: what is right
    speech.json       {"text", "seconds_per_frame", "rows": [{"stage", "mel": [[log]]}]}: spectrograms
    pictures/<stage>.png  what a model of images makes, stage by stage from the same noise
    synthesis/lowbit_ft.json  {"by", "shards": {n: {"rows", "reasons", "files", "tokens"}}}
    environment.json  one object of versions and machine facts
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files.atomic import write_text
from .activations import FILE as ACTIVATIONS
from .activations import activations_section
from .boxes import FILE as BOXES
from .boxes import boxes_section
from .files import NotShown, RunFiles, points, values
from .html import (
    STYLE,
    escape,
    folded,
    image,
    is_number,
    note,
    number,
    plain,
    table,
    tiles,
    words,
)
from .pictures import FOLDER as PICTURES
from .pictures import pictures_section
from .preferences import preference_facts
from .result import headline, result_section, verdict_of
from .rotation import FOLDER as ROTATION
from .rotation import rotation_section
from .sparsity import grown_notes, zeros_notes
from .speech import FILE as SPEECH
from .speech import speech_section
from .synthesis import FOLDER as SYNTHESIS
from .synthesis import synthesis_section
from .tasks import tasks_section

REPORT = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from the files the stages left there, replacing an older one.

    Missing or unreadable files shorten the page; they never raise. ValueError if run_dir is not a directory.
    Returns the path of the page.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: not a run directory; give the `output` folder of a run")
    target = run_dir / REPORT
    write_text(target, _page(RunFiles(run_dir)))
    return target


def _page(run: RunFiles) -> str:
    recipe = run.recipe()
    name = str(recipe.get("name") or run.folder.resolve().name)
    verdict = ""
    if run.asked(*ON_REQUEST["result"]):
        state, sentence = verdict_of(run, recipe)
        verdict = f'<p class="verdict {state}">{escape(sentence)}</p>\n'
    sections = [s for s in SECTIONS if s[0] not in ON_REQUEST or run.asked(*ON_REQUEST[s[0]])]
    left = {key for key, name in ON_ITSELF.items() if not (run.folder / name).exists()}
    sections = [s for s in sections if s[0] not in left]
    body = "".join(_section(run, key, title, build) for key, title, build in sections)
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}: lowbit_ft report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<p class="kicker">lowbit_ft run report</p>\n<h1>{escape(name)}</h1>\n'
        f'<p class="subtitle">{escape(_subtitle(recipe))}</p>\n'
        f"{verdict}{tiles(headline(run))}\n<nav>{links}</nav>\n</header>\n{body}</main>\n</body>\n</html>\n"
    )


def _section(run: RunFiles, key: str, title: str, build: Callable[[RunFiles], str]) -> str:
    try:
        content = build(run)
    except NotShown as reason:
        content = f'<p class="missing">Not shown: {escape(str(reason))}</p>'
    return f'<section id="{key}">\n<h2>{title}</h2>\n{content}\n</section>\n'


def _subtitle(recipe: dict[str, Any]) -> str:
    """Model, method, bits and group size, as much of it as the recipe says."""
    model, quant, adapter = (
        part if isinstance(part := recipe.get(key), dict) else {} for key in ("model", "quant", "adapter")
    )
    parts = [model.get("path"), adapter.get("method")]
    if quant.get("bits"):
        parts.append(f"{quant['bits']} bits, {quant.get('grid', 'integer')} grid")
    if group := quant.get("group_size"):
        parts.append("one scale per row" if group == -1 else f"groups of {group}")
    return "  ·  ".join(str(part) for part in parts if part)


# The sections: each returns HTML or raises NotShown. report_plots is imported where it draws, because
# matplotlib takes a second to load and keeps a font cache in the user's home.


def _training(run: RunFiles) -> str:
    from . import plots as report_plots  # slow: matplotlib, and only pictures need it

    section = run.recipe().get("train")
    if isinstance(section, dict) and section.get("max_steps") == 0:
        raise NotShown("No step was asked for (train.max_steps: 0).")
    rows = run.metrics()
    train, valid = points(rows, "loss"), points(rows, "valid_loss")
    names = {"lr": "", "scale_lr": " of the scales", "modules_lr": " of whole modules"}
    rates = {f"learning rate{of}": points(rows, key) for key, of in names.items()}
    facts = [("steps", number(max(row["step"] for row in rows)))]
    if train:
        facts.append(("last training loss", number(train[-1][1], 4)))
    if valid:
        facts.append(("last validation loss", number(valid[-1][1], 4)))
    facts += preference_facts(rows)
    for key in dict.fromkeys(key for row in rows for key in row if key.endswith("_per_s")):
        counted = key.removesuffix("_per_s")  # tokens, or what the task counts
        words = counted.replace("_", " ")
        if speeds := sorted(values(rows, key)):
            fine = 0 if counted == "tokens" else 1
            facts.append((f"{words} per second, median", number(speeds[len(speeds) // 2], fine)))
        if totals := values(rows, counted):
            facts.append((words, number(max(totals))))
    if memory := values(rows, "memory_gb"):
        facts.append(("peak memory", f"{max(memory):.2f} GB"))
    picture = report_plots.curves(train, valid, rates)
    return image(picture, "loss and learning rate over the steps") + tiles(facts) + _teacher(run)


def _teacher(run: RunFiles) -> str:
    """How near the teacher was to the full-precision model; nothing where none was measured."""
    try:
        facts = run.json("teacher.json", "None was measured", dict)
    except NotShown:
        return ""
    theirs, ours = facts.get("kl"), facts.get("student_kl")
    if not (is_number(theirs) and is_number(ours)):
        return ""
    section = run.recipe().get("train")
    name = section.get("teacher") if isinstance(section, dict) else None
    return note(
        f"Teacher {plain(name)}: KL to full precision {theirs:.6f}; the model as it started {ours:.6f}."
    )


def _kv_cache(run: RunFiles) -> list[str]:
    """What keys and values were trained on; nothing where they are as they come."""
    try:
        facts = run.json("kv_cache.json", "None was asked for", dict)
    except NotShown:
        return []
    ours, dense = facts.get("bytes"), facts.get("dense")
    size = (
        f"{number(ours)} bytes per token in the cache, {number(dense)} in 16 bits" if is_number(ours) else ""
    )
    return [f"Keys and values: {plain(facts.get('grid'))}; {size}."]


def _layers(run: RunFiles) -> str:
    from . import plots as report_plots  # slow: matplotlib, and only pictures need it

    rows = run.rows("quant.json", "Quantization did not run")
    quantized = [row for row in rows if row.get("action") == "quantized"]
    others = [row for row in rows if row.get("action") != "quantized"]
    weights = number(sum(values(quantized, "parameters")))
    notes = [f"{len(quantized)} layers quantized ({weights} weights), {len(others)} left alone."]
    notes += [*zeros_notes(quantized), *grown_notes(run), *_kv_cache(run)]
    panels: list[tuple[str, dict[str, float], bool]] = []
    if errors := {str(row.get("layer")): float(row["error"]) for row in rows if is_number(row.get("error"))}:
        panels.append(("relative squared error of quantization (%)", errors, True))
    try:
        moved = run.json("moved.json", "Training did not run to its end", dict)
        change = moved.pop("scale_change", None)
        shares = {layer: float(share) for layer, share in moved.items() if is_number(share)}
        if any(shares.values()):
            panels.append(("share of codes that training changed (%)", shares, False))
        elif shares:
            notes.append("Training changed no code, only scales.")
        if is_number(change):
            notes.append(f"Scales moved by {100 * change:.2f} % on average (mean |s/s0 - 1|).")
    except NotShown as reason:
        notes.append(f"Codes moved: not shown. {reason}")
    html = _fitted(run)
    if panels:
        html += image(report_plots.layers(panels), "quantization error and codes moved, per layer")
    html += "".join(note(text) for text in notes)
    if others:
        lines = [[row.get("layer"), row.get("action"), row.get("reason")] for row in others]
        html += "<h3>Left alone</h3>" + table(["layer", "action", "reason"], lines, words=3)
    if quantized:
        columns = ("layer", "bits", "group_size", "parameters", "error")
        lines = [[row.get(column) for column in columns] for row in quantized]
        head = ["layer", "bits", "group size", "weights", "relative squared error"]
        html += folded("every quantized layer", table(head, lines))
    return html


def _fitted(run: RunFiles) -> str:
    """What train.reconstruct did to every decoder layer; nothing where it was not asked for."""
    try:
        rows = run.rows("reconstruct.json", "Not asked for")
    except NotShown:
        return ""
    lines = [[row.get("layer"), *(number(row.get(key), 5) for key in ("before", "after"))] for row in rows]
    text = "error of a decoder layer's output over what the dense layer adds (train.reconstruct)"
    return folded(text, table(["decoder layer", "loss before", "loss after"], lines))


def _trainable(run: RunFiles) -> str:
    data = run.json("trainable.json", "No adapter was attached", object)
    facts = data if isinstance(data, dict) else {}
    listed = facts.get("rows") if facts else data
    rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    html = tiles(
        (words(key), plain(value)) for key, value in facts.items() if not isinstance(value, list | dict)
    )
    if rows:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        numeric = [c for c in columns if all(row.get(c) is None or is_number(row[c]) for row in rows)]
        columns = [c for c in columns if c not in numeric] + numeric
        lines = [[row.get(column) for column in columns] for row in rows]
        listing = table([words(column) for column in columns], lines, words=len(columns) - len(numeric))
        html += folded(f"all {len(rows)} rows", listing) if len(rows) > 20 else listing
    if not html:
        raise NotShown("No adapter was attached (trainable.json is empty).")
    return html


def _stages(run: RunFiles) -> str:
    from . import plots as report_plots  # slow: matplotlib, and only pictures need it

    rows = run.rows("stages.json", "No stage finished")
    bars = []
    for row in rows:
        seconds, memory = (
            float(row[key]) if is_number(row.get(key)) else None for key in ("seconds", "peak_memory_gb")
        )
        bars.append((str(row.get("stage")), seconds, memory))
    lines = [[name, number(seconds, 1), number(memory, 2)] for name, seconds, memory in bars]
    peak = max(values(rows, "peak_memory_gb"), default=None)
    lines.append(["all", number(sum(values(rows, "seconds")), 1), number(peak, 2)])
    picture = image(report_plots.stages(bars), "seconds and peak memory of each stage")
    return picture + table(["stage", "seconds", "peak memory (GB)"], lines)


def _samples(run: RunFiles) -> str:
    html = ""
    for row in run.rows("samples.json", "No prompts were given (eval.generate)"):
        texts = {key: f"<pre>{escape(plain(row.get(key)))}</pre>" for key in ("prompt", "before", "after")}
        html += (
            f'<article class="sample"><h3>prompt</h3>{texts["prompt"]}<div class="pair">'
            f"<div><h3>before training</h3>{texts['before']}</div>"
            f"<div><h3>after training</h3>{texts['after']}</div></div></article>"
        )
    return html


def _recipe(run: RunFiles) -> str:
    return f"<pre>{escape(run.text('recipe.yaml', 'The run has no recipe'))}</pre>"


def _environment(run: RunFiles) -> str:
    facts = run.json("environment.json", "The environment was not recorded", dict)
    names = {"lowbit_ft": "lowbit_ft"}  # a name; the other keys with an underscore are words
    lines = [[names.get(key, words(key)), plain(value)] for key, value in facts.items()]
    return table(["fact", "value"], lines, words=2)


SECTIONS: tuple[tuple[str, str, Callable[[RunFiles], str]], ...] = (
    ("result", "Result", result_section),
    ("tasks", "Tasks", tasks_section),
    ("boxes", "Boxes that were found", boxes_section),
    (SYNTHESIS, "Rows that the model wrote", synthesis_section),
    ("speech", "Speech", speech_section),
    (PICTURES, "Pictures", pictures_section),
    ("training", "Training", _training),
    ("layers", "Layers", _layers),
    ("activations", "Inputs of the layers", activations_section),
    ("rotation", "Rotations", rotation_section),
    ("trainable", "What was trained", _trainable),
    ("stages", "Time and memory", _stages),
    ("samples", "Samples", _samples),
    ("recipe", "Recipe", _recipe),
    ("environment", "Environment", _environment),
)

# Section -> the key of eval that asks for it, and the file that is then there.
ON_REQUEST = {
    "result": ("perplexity", "evaluation.json"),
    "tasks": ("tasks", "tasks.json"),
    "samples": ("generate", "samples.json"),
}

# Section -> what it is of; there is none where that is not.
ON_ITSELF = {
    SYNTHESIS: SYNTHESIS,
    PICTURES: PICTURES,
    "rotation": ROTATION,
    "activations": ACTIVATIONS,
    "boxes": BOXES,
    "speech": SPEECH,
}
