"""What plan predicts for the sizes we aim at, and how far off it was where it was counted: the tables of
docs/memory.md.

    python -m benchmarks.plan_targets            # print them
    python -m benchmarks.plan_targets --write    # into docs/memory.md

Predicted from shapes (tests/configs) and recipes/llama31-8b-w4-lr-qat.yaml with the changes of each row;
nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from lowbit_ft.plan.plan import Plan, no_card, plan
from lowbit_ft.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPE, PAGE = ROOT / "recipes" / "llama31-8b-w4-lr-qat.yaml", ROOT / "docs" / "memory.md"
ERRORS = ROOT / "benchmarks" / "results" / "plan_error.json"
ONE_STEP = [
    "quant.residual_bits=0",
    "quant.bits=2",
    "adapter.rank=16",
    "train.gradient_accumulation_steps=1",
    "train.offload=cpu",
]
LONG = ["data.sequence_len=65536", "train.offload=cpu", "quant.residual_bits=1"]

# (what is aimed at, limit in GB, whether the card's context counts, shape, changes to the recipe)
TARGETS: list[tuple[str, float, bool, str, list[str]]] = [
    ("8B W4, 1 residual bit, 1 x 2048", 8.0, False, "llama31_8b", ["quant.residual_bits=1"]),
    ("", 8.0, False, "llama31_8b", ["quant.residual_bits=1", "train.offload=cpu", "quant.embeddings=8"]),
    ("8B W4, 4 residual bits, 1 x 2048", 12.0, False, "llama31_8b", []),
    ("14B W4, 1 x 8192", 24.0, True, "qwen25_14b", ["quant.residual_bits=1", "data.sequence_len=8192"]),
    (
        "",
        24.0,
        True,
        "qwen25_14b",
        ["quant.residual_bits=4", "data.sequence_len=8192", "train.offload=cpu", "adapter.rank=16"],
    ),
    ("32B W3, 1 x 2048", 24.0, True, "qwen25_32b", ["quant.residual_bits=0", "quant.bits=3"]),
    (
        "",
        24.0,
        True,
        "qwen25_32b",
        [
            "quant.residual_bits=1",
            "quant.bits=3",
            "train.offload=cpu",
            "adapter.rank=16",
            "quant.embeddings=8",
        ],
    ),
    (
        "70B W2, one step of 1 x 2048",
        24.0,
        True,
        "llama31_70b",
        [*ONE_STEP, "quant.group_size=256", "quant.embeddings=8"],
    ),
    ("", 24.0, True, "llama31_70b", [*ONE_STEP, "quant.group_size=-1", "quant.embeddings=8"]),
    ("8B W4, 1 x 65536", 24.0, True, "llama31_8b", LONG),
    ("", 24.0, True, "llama31_8b", [*LONG, "train.mlp_chunk=4096"]),
]


def predicted(shape: str, changes: list[str]) -> Plan:
    made = plan(load_recipe(RECIPE, changes, check=False), ROOT / "tests" / "configs" / shape, no_card())
    assert made is not None and not made.notes
    return made


def row(target: tuple[str, float, bool, str, list[str]]) -> str:
    """One line of the table: the peak of a training step, with the card's context where the limit is a
    card.
    """
    name, limit, with_context, shape, changes = target
    made = predicted(shape, changes)
    size = made.stages["training"] - (0 if with_context else made.parts["context"])
    largest = sorted(((n, v) for n, v in made.parts.items() if n != "context"), key=lambda item: -item[1])[:3]
    words = ", ".join(f"{n} {v / 1e9:.2f}" for n, v in largest)
    shown = " ".join(f"`{change.replace('=', ': ', 1)}`" for change in changes) or "as it is"
    verdict = "yes" if size <= limit * 1e9 else f"**no**, {size / 1e9 - limit:.2f} over"
    return f"| {name} | {shown} | {limit:g} | {size / 1e9:.2f} | {verdict} | {words} |"


def table() -> str:
    head = (
        "| aim | changes to the recipe | limit GB | predicted GB | met | largest parts, GB |\n| --- | "
        "--- | ---: | ---: | --- | --- |\n"
    )
    return head + "\n".join(row(target) for target in TARGETS) + "\n"


def errors() -> str:
    """The rows of results/plan_error.json, one per way of counting."""
    kept = json.loads(ERRORS.read_text(encoding="utf-8"))
    lines = [
        "| shape | method | checkpointing | counted | predicted MB | counted MB | error |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    for r in kept["rows"]:
        word = {"real": "training", "fake": "without data"}.get(r["counted_by"], r["counted_by"])
        sizes = (
            f"{r['predicted']['total'] / 1e6:.1f} | {r['counted']['total'] / 1e6:.1f} | "
            f"{r['error_percent']:+.2f} %"
        )
        lines.append(
            f"| {r['shape']} | {r['method']} | {'yes' if r['checkpointing'] else 'no'} | {word} | {sizes} |"
        )
    return "\n".join(lines) + "\n"


def render(text: str) -> str:
    """The page with both tables in their places."""
    for marker, made in (("errors", errors()), ("targets", table())):
        text = re.sub(
            rf"(<!-- {marker} -->\n\n).*?(?=\n\n)",
            lambda m, t=made: m[1] + t.rstrip("\n"),
            text,
            flags=re.DOTALL,
        )
    return text


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--write", action="store_true")
    if p.parse_args().write:
        PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(errors())
    print(table())


if __name__ == "__main__":
    main()
