"""The model card (README.md) of a shipped folder: what it is, how it was trained, what was measured, how to serve it."""

from pathlib import Path

from .evaluate import EvalRow
from .export import EXPORTERS
from .recipe import Recipe


def model_card(recipe: Recipe, format: str, rows: list[EvalRow]) -> str:
    """Markdown with the hub's front matter. rows: the measured table; empty before it was measured."""
    grid = recipe.adapter.shipped(recipe.quant.grid_for(""))
    base = recipe.model.path
    front = ["---", "library_name: transformers", "tags: [lowbit_ft, quantized, qat]"]
    if not Path(base).exists():
        front.insert(1, f"base_model: {base}")
    lines = [
        *front,
        "---",
        f"# {recipe.name}",
        "",
        f"`{Path(base).name if Path(base).exists() else base}` fine-tuned with lowbit_ft: method `{recipe.adapter.method}`, grid {grid}.",
        "The weights in this folder are the integers and scales the training forward ran on; nothing was rounded afterwards."
        if recipe.adapter.exact_merge
        else "The adapter was trained beside the quantizer, so merging it rounded the weights once more.",
        "",
        f"Format: `{format}`. Serve it:",
        "",
        "```",
        EXPORTERS[format].serve("."),
        "```",
        "",
    ]
    if rows:
        lines += ["| stage | loss | perplexity | KL to base |", "|---|--:|--:|--:|"]
        lines += [
            f"| {r.stage} | {r.loss:.4f} | {r.perplexity:.4f} | {'' if r.kl is None else f'{r.kl:.5f}'} |" for r in rows
        ]
        lines += ["", f"Mean over {rows[0].tokens} target tokens of the evaluation data.", ""]
    lines += ["## Recipe", "", "```yaml", recipe.to_yaml().rstrip(), "```", ""]
    return "\n".join(lines)
