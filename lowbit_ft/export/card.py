"""The model card (README.md) of a shipped folder: what it is, how it was trained, what was measured, how to
serve it.
"""

from dataclasses import dataclass
from pathlib import Path

from ..evaluate.perplexity import EvalRow
from ..evaluate.tasks import TaskRow, by_task
from ..grid import Grid, IntGrid
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
    """How to use the folder, for the console. vLLM serves asymmetric grids at 4 and 8 bit only."""
    grid = facts.grid
    if format == "compressed-tensors" and isinstance(grid, IntGrid) and not grid.symmetric and grid.bits < 4:
        return (
            f'use it: AutoModelForCausalLM.from_pretrained("{folder}") (vLLM has no asymmetric '
            f"{grid.bits} bit yet)"
        )
    return f"serve it: {EXPORTERS[format].serve(str(folder))}"


USE = {
    "native": """The layers stay packed in memory.

```python
import lowbit_ft
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```""",
    "compressed-tensors": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")  # pip install compressed-tensors
tokenizer = AutoTokenizer.from_pretrained("PATH")
```""",
    "gguf": """`model.gguf` is all that llama.cpp, Ollama and LM Studio need; \
tokenizer and chat template are in it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", gguf_file="model.gguf")  # pip install gguf
tokenizer = AutoTokenizer.from_pretrained("PATH")
```""",
    "mlx": """```python
from mlx_lm import generate, load

model, tokenizer = load("PATH")  # pip install mlx-lm
```""",
}
for _name in ("gptq", "gptq_v2", "awq", "torchao"):
    USE[_name] = USE["compressed-tensors"].replace(
        "compressed-tensors", "torchao" if _name == "torchao" else "gptqmodel optimum"
    )


FIRST = {  # what must be known before a folder of the format is read: the card's first lines
    "native": "> **`import lowbit_ft` first** (`pip install lowbit-ft`): it teaches transformers this "
    "format. Without it transformers\n> stops at a missing file whose name says so; an older one warns, and "
    "starts from random weights."
}


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
        *([FIRST[format], ""] if format in FIRST else []),
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
        USE[format],
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
