"""The model card (README.md) of a shipped folder: what it is, how it was trained, what was measured, how to
serve it.
"""

from dataclasses import dataclass
from pathlib import Path

from ..evaluate.perplexity import EvalRow
from ..evaluate.tasks import TaskRow, by_task
from ..grid import Grid
from . import EXPORTERS


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a run besides its figures. base: the checkpoint, a folder or a hub id; grid: the
    one that ships.
    """

    name: str
    base: str
    method: str
    exact_merge: bool
    grid: Grid
    recipe: str


def serve_line(facts: CardFacts, format: str, folder: Path) -> str:
    """How to use the folder, for the console."""
    if note := EXPORTERS[format].note(facts.grid):
        return f'use it: AutoModelForCausalLM.from_pretrained("{folder}") ({note})'
    return f"serve it: {EXPORTERS[format].serve(str(folder))}"


def model_card(facts: CardFacts, format: str, rows: list[EvalRow], tasks: list[TaskRow] | None = None) -> str:
    """Markdown with the hub's front matter. rows, tasks: the measured tables; empty before they were
    measured.
    """
    base = facts.base
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [lowbit_ft, quantized, qat]",
    ]
    if not Path(base).exists():
        front.insert(1, f"base_model: {base}")
    lines = [
        *front,
        "---",
        *((f"> {first}", "") if (first := EXPORTERS[format].read_first) else ()),
        f"# {facts.name}",
        "",
        f"`{Path(base).name if Path(base).exists() else base}` fine-tuned with lowbit_ft: method "
        f"`{facts.method}`, grid {facts.grid}.",
        "The weights in this folder are the integers and scales the training forward ran on; nothing was "
        "rounded afterwards."
        if facts.exact_merge
        else "The adapter was trained beside the quantizer, so merging it rounded the weights once more.",
        "",
        f"## Use (format `{format}`)",
        "",
        EXPORTERS[format].use("PATH"),
        "",
        "From a shell, where PATH is this folder or its hub id:",
        "",
        "```",
        EXPORTERS[format].serve("PATH"),
        "```",
        "",
    ]
    if rows:
        lines += ["| stage | loss | perplexity | KL to base |", "|---|--:|--:|--:|"]
        lines += [
            f"| {r.stage} | {r.loss:.4f} | {r.perplexity:.4f} | {'' if r.kl is None else f'{r.kl:.5f}'} |"
            for r in rows
        ]
        lines += ["", f"Mean over {rows[0].tokens} target tokens of the evaluation data.", ""]
    if tasks:
        stages, metrics = by_task(tasks)
        lines += [f"| lm-eval task | metric | {' | '.join(stages)} |", "|---|---|" + "--:|" * len(stages)]
        for (task, metric), values in metrics.items():
            cells = " | ".join(f"{values[stage].value:.5g}" if stage in values else "" for stage in stages)
            lines.append(f"| {task} | {metric} | {cells} |")
        lines.append("")
    lines += ["## Recipe", "", "```yaml", facts.recipe.rstrip(), "```", ""]
    return "\n".join(lines)
