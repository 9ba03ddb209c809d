"""adapter: its fields are the config class of its method (lowbit_ft/adapters); here is whether that goes with
the grid, the layers and the LoRA it starts from.
"""

from __future__ import annotations

import math
from typing import Any

from ...adapters import ADAPTERS
from ...adapters.lora_start import lora_problems, read_lora
from ...adapters.masks import against_mask
from ...adapters.patterns import PATTERNS, meant
from ...grid import GRIDS
from ...names import listed, matches, nearest_layers
from ..layers import shapes_here
from ..yaml import Problem, dotted
from .base import Problems
from .overrides import layers_apart
from .quant import grids


def check_method(r: Any) -> Problems:
    """The method against the grid of every layer."""
    config = r.adapter
    kind = GRIDS[r.quant.grid].kind
    if config.grid_name != kind:
        message = (
            f"got {config.method!r}, which works on quant.grid: {config.grid_name}; the recipe has "
            f"{r.quant.grid}"
        )
        yield Problem(
            ("adapter", "method"),
            f"{message}; set quant.grid: {config.grid_name} or choose {listed(_methods_on(kind))}",
        )
        return
    for key, value in config:
        if isinstance(value, float) and not math.isfinite(value):
            yield Problem(("adapter", key), f"got {value}; allowed: a finite number")
    steps, limit = getattr(config, "warmup_steps", 0), r.train.max_steps if hasattr(r, "train") else None
    if limit is not None and steps and steps >= limit:
        yield Problem(
            ("adapter", "warmup_steps"),
            f"got {steps}, but train.max_steps is {limit}: the grid would never be trained; lower it",
        )
    if getattr(config, "dropout", 0) and hasattr(r, "train"):
        yield from _against_dropout(config, r.train)
    told = set()
    for path, grid in grids(r):
        reason = _no_residual(r, config, grid) if r.quant.from_checkpoint else config.reject(grid)
        if reason and reason not in told:
            told.add(reason)
            where = "" if path == ("quant",) else f" (for {dotted(path)})"
            yield Problem(("adapter", "method"), f"got {config.method!r}{where}: {reason}")
    yield from _gradient_cost(r, config)


def _against_dropout(config: Any, train: Any) -> Problems:
    """What runs a layer twice for one gradient, and would draw other inputs the second time."""
    if train.mlp_chunk is not None:
        yield Problem(
            ("adapter", "dropout"),
            f"got {config.dropout:g} with train.mlp_chunk, which makes the MLP's products again in the "
            "backward pass, with other inputs dropped; set dropout: 0, or mlp_chunk: null",
        )
    if not train.gradient.backward:
        yield Problem(
            ("adapter", "dropout"),
            f"got {config.dropout:g} with gradient.kind: {train.gradient.kind}, which compares two forwards "
            "of the same inputs; set dropout: 0",
        )


def _gradient_cost(r: Any, config: Any) -> Problems:
    """Cheaper gradients that would cost more than the exact ones."""
    if getattr(config, "low_rank_gradient", "exact") == "exact":
        return
    rank = max(config.ranks(config.rank))
    for path, grid in grids(r):
        if (cost := config.model_copy(update={"rank": rank}).gradient_cost(grid)) >= 1:
            where = "" if path == ("quant",) else f" (for {dotted(path)})"
            yield Problem(
                ("adapter", "low_rank_gradient"),
                f"got {config.low_rank_gradient!r}{where}, which with rank {rank}, group size "
                f"{grid.group_size} and scale_grad_tokens "
                f"{config.scale_grad_tokens:g} costs {cost:.2f} products of a layer's size where exact "
                "costs 1 (2 rank / group_size, and the "
                "share of the tokens that scales learn from); set scale_grad_tokens: 0.25 or less, a "
                "smaller rank, or low_rank_gradient: exact",
            )
            return


def _no_residual(r: Any, config: Any, grid: Any) -> str | None:
    """Why a method cannot train on a base that came quantized: there is no residual, and no dense weight to
    make one from.
    """
    if grid.mask and (reason := against_mask(config)):
        return reason
    start, grid = getattr(config, "init", "zero"), grid.deployed
    plain = config.model_copy(update={"init": "zero"}) if start != "zero" else config
    if plain.reject(grid):
        fit = [
            name
            for name, kind in ADAPTERS.items()
            if kind.grid_name == grid.kind and not kind(method=name).reject(grid)
        ]
        why = (
            f"{config.method} needs the fraction that rounding threw away, which "
            f"{r.model.path if hasattr(r, 'model') else 'a quantized checkpoint'} does not have"
        )
    elif start != "zero":
        return (
            f"adapter.init: {start} reads the rounding error, which a quantized checkpoint does not "
            "have; set adapter.init: zero"
        )
    else:
        return None
    return f"{why}; use {listed(fit)}, or give the full-precision checkpoint as model.path"


def check_adapter_layers(r: Any) -> Problems:
    """adapter.targets against the layers that are packed, and the LoRA of adapter.init_from against them."""
    shapes = shapes_here(r.model.path, r.model.revision)
    config = r.adapter
    packed = [] if shapes is None else shapes.packed(r.quant)
    layers = {} if shapes is None else {x.name: x for x in layers_apart(r.quant, packed, shapes)}
    for i, pattern in enumerate(config.targets or []):
        if layers and not any(matches(pattern, name) for x in layers.values() for name in x.names):
            yield Problem(
                ("adapter", "targets", i),
                f"got {pattern!r}, which matches no packed layer{nearest_layers(pattern, list(layers))}",
            )
    trained = [name for name, layer in layers.items() if config.trains(*layer.names)]
    for key, pattern in [(name, p) for name in PATTERNS for p in getattr(config, name, {})]:
        apart = [x for x in layers.values() if meant(pattern, x.names[-1]) and not meant(pattern, x.name)]
        if apart:
            whole, parts = apart[0].names[-1], [x.name for x in apart if x.names[-1] == apart[0].names[-1]]
            yield Problem(
                ("adapter", key, pattern),
                f"got {pattern!r}, which means {whole}, whose parts are packed apart (quant.overrides), each "
                f"with an adapter of its own; name these: {listed(n.rpartition('.')[2] for n in parts)}",
            )
        elif trained and not any(meant(pattern, name) for name in trained):
            yield Problem(
                ("adapter", key, pattern),
                f"got {pattern!r}, which matches no layer that trains{nearest_layers(pattern, trained)}",
            )
    source = getattr(config, "init_from", None)
    if source is None:
        return
    here = ("adapter", "init_from")
    if getattr(config, "init", "zero") != "zero":
        yield Problem(
            ("adapter", "init"),
            f"got {config.init!r} beside init_from; A and B have one start: remove one of the two",
        )
    try:
        lora = read_lora(source)
    except (OSError, ValueError) as error:
        yield Problem(here, f"got {source!r}: {error}")
        return
    # A file may name its layers without the model's prefix; then the check waits for the model
    # (adapters/lora_start.py).
    named = any(name in layers for name in lora.pairs)
    adapted = {n: (x.out_features, x.in_features) for n, x in layers.items() if config.trains(*x.names)}
    for problem in lora_problems(
        lora, config, adapted if named else {n: (b.shape[0], a.shape[1]) for n, (a, b) in lora.pairs.items()}
    ):
        yield Problem(here, f"got {source!r}: {problem}")


def _methods_on(kind: str) -> list[str]:
    return [name for name, config in ADAPTERS.items() if config.grid_name == kind]
