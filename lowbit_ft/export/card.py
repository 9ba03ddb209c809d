"""The model card (README.md) of a shipped folder: what it is, how it was trained, what was measured, how to
serve it.

Names of folders and tasks come from elsewhere, and a card is shown as a page: `shown` writes them so that no
character of theirs is Markdown, HTML or the end of a table cell. The recipe is data in a fence that nothing
in it can close.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..evaluate.perplexity import EvalRow
from ..evaluate.tasks import TaskRow, by_task
from ..grid import Grid
from ..kv_cache import KVConfig
from . import EXPORTERS

WRITES = "text-generation"  # the pipeline of language models, which servers run


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a run besides its figures. base: the checkpoint, a folder or a hub id; grid: the
    one that ships. method, recipe: None where a folder that no run wrote does not say them. pipeline, auto:
    what the model is for, as the hub calls it, and the class that loads it.
    """

    name: str
    base: str
    method: str | None
    exact_merge: bool
    grid: Grid
    recipe: str | None
    kv_cache: KVConfig | None = None
    pipeline: str = WRITES
    auto: str = "AutoModelForCausalLM"


def serve_line(facts: CardFacts, format: str, folder: Path) -> str:
    """How to use the folder, for the console."""
    command, about = _served(facts, format, str(folder))
    return f"serve it: {command}{f'{chr(10)}  kv cache: {about}' if about else ''}"


def _served(facts: CardFacts, format: str, folder: str) -> tuple[str, str]:
    """The command line that runs the folder, and what to know about its cache ("": nothing)."""
    exporter, kv_cache = EXPORTERS[format], facts.kv_cache
    if facts.pipeline != WRITES:
        first = "import lowbit_ft; " if format == "native" else ""
        ask = f"print(pipeline('{facts.pipeline}', '{folder}')('TEXT'))"
        return f'python -c "{first}from transformers import pipeline; {ask}"', ""
    command = exporter.serve(folder)
    if kv_cache is None or exporter.carries_kv_cache:
        return command, "" if kv_cache is None else f"{kv_cache}; the folder says so, and its reader does it"
    return kv_cache.served(exporter.kv_server, command)


def model_card(facts: CardFacts, format: str, rows: list[EvalRow], tasks: list[TaskRow] | None = None) -> str:
    """Markdown with the hub's front matter. rows, tasks: the measured tables; empty before they were
    measured.
    """
    base, (command, about) = facts.base, _served(facts, format, "PATH")
    front = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {facts.pipeline}",
        "tags: [lowbit_ft, quantized, qat]",
    ]
    if not Path(base).exists() and _is_hub_id(base):
        front.insert(1, f"base_model: {base}")
    lines = [
        *front,
        "---",
        *((f"> {first}", "") if (first := EXPORTERS[format].read_first) else ()),
        f"# {facts.name}",
        "",
        f"{shown(base if _is_hub_id(base) and not Path(base).exists() else Path(base).name)} "
        + (
            f"packed with lowbit_ft: grid {facts.grid}."
            if facts.method is None
            else f"fine-tuned with lowbit_ft: method `{facts.method}`, grid {facts.grid}."
        ),
        "The weights in this folder are the integers and scales of the packed model it was written from; "
        "nothing was rounded on the way."
        if facts.method is None
        else "The weights in this folder are the integers and scales the training forward ran on; nothing "
        "was rounded afterwards."
        if facts.exact_merge
        else "The adapter was trained beside the quantizer, so merging it rounded the weights once more.",
        "",
        f"## Use (format `{format}`)",
        "",
        EXPORTERS[format].use("PATH").replace("AutoModelForCausalLM", facts.auto),
        "",
        "From a shell, where PATH is this folder or its hub id:",
        "",
        "```",
        command,
        "```",
        "",
        *((f"Key-value cache: {about}.", "") if about else ()),
    ]
    if rows:
        scored = any(row.scores for row in rows)
        names = list(dict.fromkeys(name for row in rows for name in row.numbers)) if scored else _LANGUAGE
        lines += [f"| stage | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
        lines += [f"| {r.stage} | {' | '.join(_cell(r, name) for name in names)} |" for r in rows]
        over = "answers" if scored else "target tokens"
        lines += ["", f"Mean over {rows[0].tokens} {over} of the evaluation data.", ""]
    if tasks:
        stages, metrics = by_task(tasks)
        lines += [f"| lm-eval task | metric | {' | '.join(stages)} |", "|---|---|" + "--:|" * len(stages)]
        for (task, metric), values in metrics.items():
            cells = " | ".join(f"{values[stage].value:.5g}" if stage in values else "" for stage in stages)
            lines.append(f"| {escaped(task)} | {escaped(metric)} | {cells} |")
        lines.append("")
    if facts.recipe is not None:
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", facts.recipe))])
        lines += ["## Recipe", "", f"{fence}yaml", facts.recipe.rstrip(), fence, ""]
    return "\n".join(lines)


_LANGUAGE = ["loss", "perplexity", "KL to base"]


def _cell(row: EvalRow, name: str) -> str:
    value = row.numbers.get(name)
    return "" if value is None else f"{value:.{5 if name == 'KL to base' else 4}f}"


def shown(name: str) -> str:
    """A name in the text of a card: code where its characters are those of ordinary names, else escaped."""
    return f"`{name}`" if re.fullmatch(r"[\w.+@/-][\w.+@/ -]*", name) else escaped(name)


def escaped(name: str) -> str:
    """A name with every character that is none of ordinary names as its number (&#60;), which no reader of
    Markdown takes for more than the character."""
    return re.sub(r"[^\w.+@/(), -]", lambda found: f"&#{ord(found[0])};", name)


def _is_hub_id(base: str) -> bool:
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return True
