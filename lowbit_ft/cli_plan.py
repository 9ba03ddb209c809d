"""How `lowbit-ft plan` shows a recipe: what it does, its layers, its memory."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table

from lowbit_ft.plan import Plan, plan
from lowbit_ft.recipe import Recipe


def show_plan(recipe: Recipe, console: Console | None = None) -> Plan | None:
    """Print the plan; returns it (None: the checkpoint is a hub id that is not on this disk yet)."""
    console = console or Console()
    train = recipe.train
    windows = train.micro_batch_size * train.gradient_accumulation_steps
    length = f"{train.max_steps} steps" if train.max_steps is not None else f"{train.epochs:g} epochs"
    rates = (
        f"learning rate {train.learning_rate:g}, scales {train.scale_learning_rate or train.learning_rate:g}"
    )
    for label, text in (
        ("name", recipe.name),
        ("model", f"{recipe.model.path} in {recipe.model.dtype}"),
        (
            "quant",
            f"{recipe.quant.grid} {recipe.quant.bits} bit, group {recipe.quant.group_size}, started by {recipe.quant.calibrate}",
        ),
        ("adapter", ", ".join(f"{key} {value}" for key, value in recipe.adapter if value is not None)),
        (
            "data",
            f"{recipe.data.train.path} ({recipe.data.train.format}), windows of {recipe.data.sequence_len} tokens",
        ),
        ("train", f"{length} of {windows} windows, {train.optimizer}, {train.scheduler}, {rates}"),
        ("export", recipe.export.format),
        ("output", str(recipe.output)),
    ):
        console.print(f"{label:>8}  {text}", markup=False, highlight=False, soft_wrap=True)

    made = plan(recipe)
    if made is None:
        console.print(
            f"\n{recipe.model.path} is not on this disk: layers and memory are shown once it is fetched",
            markup=False,
        )
        return None
    table = Table(
        Column("layer", overflow="fold"),
        "count",
        "out x in",
        "grid",
        "MB each",
        "trained",
        title="linear layers",
        title_justify="left",
    )
    for kind, count, row in made.kinds():
        size = (row.base_bytes + row.residual_bytes) / 1e6
        cells = (
            (row.grid, f"{size:.2f}", f"{row.trainable:,}")
            if row.reason is None
            else (f"skipped: {row.reason}", "", "")
        )
        table.add_row(kind, str(count), f"{row.out_features} x {row.in_features}", *cells)
    console.print()
    console.print(table)
    memory = Table("memory", "MB", title="estimate while training", title_justify="left")
    for name, size in made.memory.items():
        memory.add_row(f"{name} (rough)" if name == "activations" else name, f"{size / 1e6:,.1f}")
    memory.add_section()
    memory.add_row("total", f"{made.total / 1e6:,.1f}")
    console.print(memory)
    console.print(
        f"{made.trainable:,} trained parameters; the shipped layers take {made.memory['base'] / 1e6:,.1f} MB",
        highlight=False,
    )
    return made
