"""export: what is written for serving, and whether the format can hold what the other sections make, so that
training never ends in a model that cannot be written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ...export import EXPORTERS, LayerSpec
from ...export.planes import held
from ...export.servers import SERVERS
from ...files.tensorfile import CheckpointError
from ...model.config import load_config
from ..layers import Shapes, local_folder, shapes_here
from ..paths import path_is
from ..values import OneOf
from ..yaml import Problem, dotted
from .base import Problems, Section
from .quant import grids, packed_layers


class ExportSection(Section):
    """What is written for serving."""

    format: Annotated[str, OneOf(EXPORTERS)] = Field(
        default="compressed-tensors",
        description="compressed-tensors (vLLM, SGLang, transformers), gguf (llama.cpp, Ollama), gptq, "
        "gptq_v2, awq, mlx (mlx-lm), torchao, onnx (ONNX Runtime), "
        "or native (every grid)",
    )
    server: Annotated[str, OneOf(SERVERS)] = Field(
        default="any",
        description="who will load it: what that server refuses is refused before training; any: only what "
        "the format holds is asked",
    )
    verify: bool = Field(default=True, description="reload the export and compare codes, scales and logits")


def check_export(r: Any) -> Problems:
    """The export format against the grid of every layer, so that training never ends in a model that cannot
    be written.
    """
    name = r.export.format
    told = set()
    yield from _check_reader(r, EXPORTERS[name])
    config = getattr(r, "adapter", None)
    first = next((grid for _, grid in grids(r)), None)
    if (
        config is not None
        and first is not None
        and config.ships_offset
        and EXPORTERS[name].reject(first, offset=True) != EXPORTERS[name].reject(first)
    ):
        message = (
            f"got {name!r}, which holds no float offset per group; {config.method} with this "
            "adapter.offset ships one"
        )
        yield Problem(("export", "format"), f"{message}; set adapter.offset: auto, or export.format: native")
    for path, grid in grids(r):
        if config is not None and config.grid_name == grid.kind:
            grid = config.shipped(grid)
        grid = held(EXPORTERS[name], grid)
        reason = EXPORTERS[name].reject(grid)
        if reason is None and hasattr(r, "model"):
            reason = EXPORTERS[name].reject_dtype(grid, r.model.dtype)
        if reason and reason not in told:
            told.add(reason)
            where = "" if path == ("quant",) else f" (for {dotted(path)})"
            yield Problem(("export", "format"), f"got {name!r}{where}: {reason}")
    shapes = shapes_here(r.model.path, r.model.revision) if not told and hasattr(r, "model") else None
    if shapes is None:
        return
    yield from _check_kinds(r, shapes)
    specs, widths = {}, {}
    embedding = shapes.token_embedding
    for layer in packed_layers(r.quant, shapes):
        try:
            grid = r.quant.grid_for(*layer.names)
        except ValueError:
            return  # bits the grid does not have: check_grid told
        if layer == embedding:
            if EXPORTERS[name].reject_matrix(replace(layer.matrix, embedding=True), grid, layer.parts):
                continue  # _check_kinds told
        elif config is not None and config.grid_name == grid.kind and config.trains(*layer.names):
            grid = config.shipped(grid)
        grid = held(EXPORTERS[name], grid)
        specs[layer.name] = LayerSpec((layer.out_features, layer.in_features), grid)
        if reason := EXPORTERS[name].reject_width(grid, layer.in_features):
            widths.setdefault((reason, layer.divides(grid.group_size)), []).append(layer.name)
    for (reason, divides), names in widths.items():
        if divides:  # else check_groups tells which sizes do
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield Problem(("export", "format"), f"got {name!r}, which cannot hold {names[0]}{more}: {reason}")
    # What is left is about layers together (mixed grids).
    alone = {f"{layer}: {reason}" for (reason, _), names in widths.items() for layer in names}
    head = f"{shapes.head.name}: " if r.quant.lm_head is not None and shapes.head is not None else None
    for reason in (
        [reason for reason in EXPORTERS[name].reject_model(specs) if reason not in alone] if specs else []
    ):
        if head is not None and reason.startswith(head):
            yield Problem(
                ("quant", "lm_head"), f"got {r.quant.lm_head}, and export.format is {name}: {reason}"
            )
        else:
            where = ("quant", "overrides") if r.quant.overrides else ("export", "format")
            yield Problem(where, f"export.format {name} cannot hold these layers together: {reason}")


def _check_reader(r: Any, exporter: Any) -> Problems:
    """The packages a format needs, and what the model itself must be for it."""
    if reason := exporter.missing(exporter.writes_with):
        yield Problem(("export", "format"), f"got {exporter.name!r}, which {reason}")
        return
    if r.export.verify and (reason := exporter.missing(exporter.reads_with)):
        yield Problem(
            ("export", "verify"),
            f"got true, and reading {exporter.name} {reason}; or set export.verify: false and check the "
            "folder elsewhere",
        )
    if r.quant.kv_cache is not None and (reason := exporter.reject_kv_cache()):
        yield Problem(("quant", "kv_cache"), f"got a section, and export.format is {exporter.name}: {reason}")
    folder = local_folder(r.model.path, r.model.revision) if hasattr(r, "model") else None
    if folder is None:
        return
    try:
        config = load_config(folder).to_dict()
    except CheckpointError:  # check_model tells
        return
    whole = path_is(
        Path(r.model.path).expanduser(), "dir"
    )  # of a hub id, only part of the files may have been fetched
    for reason in exporter.reject_checkpoint(config, folder if whole else None):
        yield Problem(("export", "format"), f"got {exporter.name!r}: {reason}")


def _check_kinds(r: Any, shapes: Shapes) -> Problems:
    """Layers that are no plain linears (experts, Conv1D, an embedding) against the format."""
    exporter, reasons, specs = EXPORTERS[r.export.format], {}, {}
    embedding = shapes.token_embedding
    layers = [(x, replace(x.matrix, embedding=x == embedding)) for x in packed_layers(r.quant, shapes)]
    for layer, matrix in layers:
        try:
            grid = r.quant.grid_for(*layer.names)
        except ValueError:
            continue  # bits the grid does not have: check_grid told
        if layer.tensors:  # else a tied head, which gets tensors of its own
            reasons.setdefault(exporter.reject_matrix(matrix, grid, layer.parts), layer.name)
        specs[layer.name] = LayerSpec(matrix.shape, grid)
    if any(matrix.expert is not None for _, matrix in layers):
        reasons.setdefault(exporter.reject_experts(specs), "all layers")
    for reason, name in reasons.items():
        if reason is not None:
            yield Problem(
                ("export", "format"), f"got {r.export.format!r} (for {name} and its like): {reason}"
            )
