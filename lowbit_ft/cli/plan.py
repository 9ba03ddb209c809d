"""How `lowbit-ft plan` shows a recipe: what it does, its layers, its memory against a card, what to change.
Made to be read at 100 columns. GB are 10^9 bytes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ..adapters import AdapterConfig
from ..export import EXPORTERS
from ..files.atomic import write_text
from ..model.config import read_config
from ..plan.fixes import (
    MOST_WINDOWS,
    Planner,
    combination,
    fit,
    fixes,
    largest_batch,
    largest_length,
)
from ..plan.plan import Card, Plan, find_card, plan, plan_folder
from ..plan.reconstruct import duration, reconstruct_words
from ..plan.stages import throughput
from ..plan.turned import folded
from ..recipe.defaults import taken
from ..recipe.recipe import Recipe
from .places import refuse_existing
from .refusal import override, saved

WIDE = 200  # characters, where nobody's window cuts them
_WORDS = {
    "codes": "packed integers, the ones that ship",
    "residual": "bits of the rounding error kept while training",
    "mask": "a bit per weight: which are zero and stay it",
    "scales and zeros": "of the packed layers",
    "norms and other": "norms, biases, layers left alone, rotary tables",
    "adapters": "fp32 masters of what trains",
    "gradients": "fp32, as large as the masters",
    "moved tensors": "train.gradient: a copy of what its forwards move",
    "average of gradients": "train.gradient.momentum, fp32",
    "kept codes": "train.keep_codes: codes of the step, kept for all its passes",
    "batch and masks": "token ids, rotary tables, attention mask",
    "one layer": "its activations while it is computed again for backward",
    "loss": "norm, logits of one chunk and their gradient, some rows in fp32",
    "workspace": "inside packed ops: a chunk of dW, a chunk of decoded weights",
    "gathered layers": "train.sharding: two layers and what lies around them, whole",
    "gradient buckets": "DDP's own copies of the gradients",
}


def show_plan(
    recipe: Recipe,
    console: Console | None = None,
    *,
    folder: Path | None = None,
    memory_gb: float | None = None,
    processes: int = 1,
    tokens_per_second: float | None = None,
    search: bool = True,
) -> Plan | None:
    """Print the plan; returns it (None: config.json is not on this disk and no folder with one is given)."""
    console = console or _console()
    _show_recipe(recipe, console)
    card = find_card(recipe, memory_gb)
    folder = folder or plan_folder(recipe)
    made = plan(recipe, folder, card, processes)
    if made is None or folder is None:
        console.print(
            f"\n{recipe.model.path} is not on this disk, so its layers and memory are not known. Fetch its "
            "config.json "
            "(a few KB), or give a folder that has it:  lowbit-ft plan RECIPE --config FOLDER",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return None
    planner = Planner(recipe, folder, card, processes)
    _show_layers(made, console)
    if recipe.train.max_steps != 0:
        _show_parts(made, console)
    _show_stages(made, console)
    if search and recipe.train.max_steps != 0:
        _show_largest(planner, made, console)
    _show_needs(recipe, made, console, tokens_per_second)
    for note in made.notes:
        _say(console, f"note: {note}")
    if not made.fits:
        _show_fixes(planner, made, console)
    return made


def _console() -> Console:
    """Standard output; in a pipe or a file as wide as the tables are, where rich would cut them at 80."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=WIDE) if piped else Console()


def write_fit(
    recipe: Recipe,
    output: Path,
    console: Console | None = None,
    *,
    folder: Path | None = None,
    memory_gb: float | None = None,
    processes: int = 1,
    force: bool = False,
) -> Plan:
    """Write the recipe as the card allows it. ValueError: no config.json, nothing fits, `output` exists."""
    refuse_existing(output, force, "give --fit another name")
    console = console or Console()
    folder = folder or plan_folder(recipe)
    if folder is None:
        raise ValueError(
            f"{recipe.model.path} is not on this disk: fetch it, or give a folder with its config.json "
            "(--config FOLDER)"
        )
    card = find_card(recipe, memory_gb)
    chosen, made = fit(Planner(recipe, folder, card, processes))
    text = (
        f"# Written by `lowbit-ft plan --fit` for {card.name}: {made.total / 1e9:.2f} GB at the peak "
        f"({made.stage}).\n{chosen.to_yaml()}"
    )
    write_text(output, text)
    before, after = recipe.model_dump(mode="json"), chosen.model_dump(mode="json")
    changes = [
        f"{section}.{key}: {before[section][key]} -> {value}"
        for section, values in after.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if before[section].get(key) != value
    ]
    _say(
        console,
        f"\nwrote {output}: {made.total / 1e9:.2f} GB of {card.nbytes / 1e9:.2f} GB; "
        + ("; ".join(changes) or "nothing had to change"),
    )
    return made


def _show_recipe(recipe: Recipe, console: Console) -> None:
    train, server = recipe.train, recipe.export.server
    windows = train.micro_batch_size * train.gradient_accumulation_steps
    length = f"{train.max_steps} steps" if train.max_steps is not None else f"{train.epochs:g} epochs"
    rates = f"learning rate {train.learning_rate}, scales {train.scale_learning_rate or train.learning_rate}"
    for label, text in (
        ("name", recipe.name),
        ("model", f"{recipe.model.path} in {recipe.model.dtype}"),
        *(() if recipe.task.language else (("task", recipe.task.kind),)),
        (
            "quant",
            f"{recipe.quant.grid} {recipe.quant.bits} bit, group {recipe.quant.group_size}, started by "
            f"{recipe.quant.calibrate}{folded(recipe.quant)}{recipe.quant.sparsity.said}{recipe.quant.inputs}",
        ),
        ("adapter", _adapter(recipe.adapter)),
        (
            "data",
            f"{recipe.data.rows}, windows of {recipe.data.sequence_len} tokens",
        ),
        (
            "train",
            f"{length} of {windows} windows, {train.optimizer}, {train.scheduler}, loss {train.loss}, "
            f"{rates}",
        ),
        ("export", recipe.export.format + ("" if server == "any" else f" for {server}")),
        ("output", str(recipe.output)),
        *(("auto", line) for line in taken(recipe)),
    ):
        console.print(f"{label:>8}  {text}", markup=False, highlight=False, soft_wrap=True)


def _adapter(adapter: AdapterConfig) -> str:
    """The method, its rank, and what else the recipe sets."""
    shown = {"rank", "alpha"} | adapter.model_fields_set
    others = [f"{key} {value}" for key, value in adapter if key in shown - {"method"} and value is not None]
    return ", ".join([adapter.method, *others])


def _show_layers(made: Plan, console: Console) -> None:
    table = Table(
        Column("layer", overflow="fold", min_width=32),
        Column("count", no_wrap=True),
        Column("out x in", no_wrap=True),
        "grid",
        Column("MB each", no_wrap=True),
        Column("trained", no_wrap=True),
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


def _show_parts(made: Plan, console: Console) -> None:
    recipe, words = made.recipe, dict(_WORDS)
    words["context"] = "CUDA context and libraries" if made.card.arch else "Python and libraries"
    words["optimizer states"] = recipe.train.optimizer + (
        ": the large ones in CPU memory" if "paged" in recipe.train.optimizer else ""
    )
    words["saved layer inputs"] = "kept from forward to backward"
    if recipe.train.gradient_checkpointing:
        words["saved layer inputs"] = "input of every layer" + (
            f", in {recipe.train.offload} memory" if recipe.train.offload != "no" and made.card.arch else ""
        )
    else:
        words["saved layer inputs"] = "activations of every layer: gradient_checkpointing is off"
        words["one layer"] = "while it is computed"
    for name, key in (("embeddings", recipe.quant.embeddings), ("head", recipe.quant.lm_head)):
        words[name] = f"packed to {key} bits" if key is not None else f"in {recipe.model.dtype}"
    if made.parts["head"] == 0:
        words["head"] = "the embedding's matrix is the head too"
    shared = f", by {made.processes} processes, on each" if made.processes > 1 else ""
    table = Table(
        "part",
        Column("GB", justify="right"),
        "",
        title=f"peak of a training step: in {made.peak_at}{shared}",
        title_justify="left",
    )
    for name, size in made.parts.items():
        if size == 0 and name not in ("head", "optimizer states", *made.moments):
            continue
        cell, text = f"{size / 1e9:.3f}", words.get(name, "")
        if name in made.moments:
            cell, text = "", f"{made.moments[name] / 1e9:.3f} GB, but at another moment ({text})"
        table.add_row(name, cell, escape(text))
    table.add_section()
    table.add_row("total", f"{sum(made.parts.values()) / 1e9:.3f}", f"{made.trainable:,} trained parameters")
    console.print(table)


def _show_stages(made: Plan, console: Console) -> None:
    card = made.card
    table = Table(
        "stage",
        Column("peak GB", justify="right"),
        f"of {card.nbytes / 1e9:.2f} GB",
        title=f"against {card.name}",
        title_justify="left",
    )
    for name, size in made.stages.items():
        over = size - card.nbytes
        table.add_row(
            name,
            f"{size / 1e9:.2f}",
            f"{100 * size / card.nbytes:.0f} %" + (f", {over / 1e9:.2f} GB too much" if over > 0 else ""),
        )
    console.print(table)
    word = "fits" if made.fits else "does NOT fit"
    _say(
        console, f"{word}: {made.total / 1e9:.2f} GB at the peak ({made.stage}) of {card.nbytes / 1e9:.2f} GB"
    )


def _show_largest(planner: Planner, made: Plan, console: Console) -> None:
    recipe = planner.recipe
    values = read_config(planner.folder) if planner.folder is not None else {}
    text = values.get("text_config")
    positions = values.get("max_position_embeddings") or (
        text.get("max_position_embeddings") if isinstance(text, dict) else None
    )
    batch, length = largest_batch(planner), largest_length(planner, positions)
    more = " or more" if batch == MOST_WINDOWS else ""
    one = (
        f"{batch:,}{more} at windows of {recipe.data.sequence_len:,} tokens"
        if batch
        else f"none at windows of {recipe.data.sequence_len:,} tokens"
    )
    other = (
        f"{length:,} tokens at micro batch {recipe.train.micro_batch_size}"
        if length
        else f"none at micro batch {recipe.train.micro_batch_size}"
    )
    _say(
        console,
        f"largest micro batch that trains: {one}; longest window: {other}"
        + (" (all positions it has)" if length and length == positions else ""),
    )


def _show_needs(recipe: Recipe, made: Plan, console: Console, tokens_per_second: float | None) -> None:
    needs = made.needs
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in needs.disk.items())
    _say(console, f"disk: {needs.on_disk / 1e9:.2f} GB ({parts})")
    away = f", {needs.offloaded / 1e9:.2f} of them layer inputs" if needs.offloaded else ""
    _say(console, f"RAM: about {needs.ram / 1e9:.1f} GB{away}" + (f"\n{made.cache}" if made.cache else ""))
    if unplanned := EXPORTERS[recipe.export.format].unplanned:
        _say(console, f"not in it: {unplanned}")
    pace, each = recipe.task.pace, needs.counted_per_step
    steps, rate = needs.steps, tokens_per_second or throughput(recipe.output, pace.key)
    if recipe.train.reconstruct is not None:
        _say(console, reconstruct_words(recipe, rate))
    if steps == 0:
        return
    if each is None:  # of sound nobody knows how long it is
        _say(console, f"{recipe.train.epochs:g} epochs" if steps is None else f"{steps:,} steps")
        return
    if steps is None:
        said = f"{each:,} {pace.word} per step; their number is known once the data is read"
        _say(console, f"{said} ({recipe.train.epochs:g} epochs)")
        return
    line = f"{steps:,} steps of {each:,} {pace.word}: {steps * each:,} {pace.word}"
    if rate:
        source = "given" if tokens_per_second else f"measured in {recipe.output}"
        line += f", about {duration(steps * each / rate)} at {rate:,.0f} {pace.word}/s ({source})"
    else:
        line += "; --tokens-per-second, or an earlier run in the same output folder, gives the time"
    _say(console, line)


def _show_fixes(planner: Planner, made: Plan, console: Console) -> None:
    known = fixes(planner, made)
    table = Table(
        Column("change", no_wrap=True),
        "saves",
        "costs",
        title="what would save memory, cheapest first",
        title_justify="left",
    )
    for fix in known:
        table.add_row(str(fix).replace(", ", "\n"), saved(made, fix), fix.cost)
    if known:
        console.print(table)
    found = combination(planner, made, known)
    if found is None:
        _say(
            console,
            "no combination of these was found that fits: take a smaller model, a lower "
            "quant.bits, or more GPUs",
        )
        return
    _say(
        console,
        f"this fits ({found[1].total / 1e9:.2f} GB):  {'  '.join(override(fix) for fix in found[0])}",
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


__all__ = ["Card", "show_plan", "write_fit"]
