"""What a run will hold in memory, worked out from config.json and safetensors headers; nothing is loaded.

    base         codes, scales, zero points of the quantized layers     (exact)
    residual     the extra bits kept while training, never shipped      (exact)
    unquantized  embeddings, head, norms, excluded layers, in model.dtype   (exact)
    adapter      fp32 masters                                           (exact)
    gradients    as large as the masters                                (exact)
    optimizer    its states                                             (exact up to the blocks of 8-bit states)
    activations  what backward needs, and the logits                    (rough: a sum over the shapes of a Llama-like layer)

Left out: the CUDA context (about 0.5 GB), fragmentation, and the transient weight gradient of one layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from lowbit_ft.grid import empty_weight
from lowbit_ft.losses import FLOATS_AT_A_TIME, LOGITS_AT_A_TIME
from lowbit_ft.recipe import Recipe
from lowbit_ft.recipe_layers import Shapes, local_folder, natural, read_shapes

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class PlanRow:
    """One linear layer: weight [N, K]; `reason` says why it is skipped (None: quantized on `grid`); sizes in
    bytes, parameters.
    """

    layer: str
    out_features: int
    in_features: int
    grid: str = ""
    reason: str | None = None
    base_bytes: int = 0
    residual_bytes: int = 0
    trainable: int = 0


@dataclass(frozen=True)
class Plan:
    """The rows and the memory (bytes by name, in the order of the module's docstring)."""

    rows: list[PlanRow]
    memory: dict[str, int]
    trainable: int
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    def kinds(self) -> Iterable[tuple[str, int, PlanRow]]:
        """Rows alike but for the layer number, once each: (name with * for the number, how many, one of
        them).
        """
        groups: dict[tuple[Any, ...], list[PlanRow]] = {}
        for row in self.rows:
            kind = ".".join("*" if part.isdecimal() else part for part in row.layer.split("."))
            groups.setdefault((kind, row.out_features, row.in_features, row.grid, row.reason), []).append(row)
        for key, rows in groups.items():
            yield (key[0] if len(rows) > 1 else rows[0].layer), len(rows), rows[0]


def plan(recipe: Recipe) -> Plan | None:
    """The plan of a recipe whose checkpoint is on this disk; None for a hub id that was not fetched yet.

    Raises:
        ValueError: the folder is no readable checkpoint.
    """
    folder = local_folder(recipe.model.path, recipe.model.revision)
    if folder is None:
        return None
    shapes = read_shapes(folder)
    size = DTYPE_BYTES[recipe.model.dtype]
    layers = shapes.linears
    if recipe.quant.lm_head is not None and (head := shapes.head) is not None and head not in layers:
        layers.append(head)
    rows = [_row(recipe, layer.name, layer.out_features, layer.in_features) for layer in layers]
    quantized = {name for layer, row in zip(layers, rows, strict=True) if row.reason is None for name in layer.tensors}
    if recipe.quant.embeddings is not None and (embedding := shapes.token_embedding) is not None:
        rows.append(_row(recipe, embedding.name, embedding.out_features, embedding.in_features, trained=False))
        quantized.update(embedding.tensors)
    rest = sum(_count(shape) for name, shape in shapes.tensors.items() if name not in quantized)
    trainable = sum(row.trainable for row in rows)
    memory = {
        "base": sum(row.base_bytes for row in rows),
        "residual": sum(row.residual_bytes for row in rows),
        "unquantized": rest * size,
        "adapter": trainable * 4,
        "gradients": trainable * 4,
        "optimizer": trainable * optimizer_bytes(recipe.train.optimizer),
        "activations": _activations(recipe, shapes, size),
    }
    return Plan(sorted(rows, key=lambda row: natural(row.layer)), memory, trainable)


def optimizer_bytes(name: str) -> int:
    """Bytes of optimizer state per trained parameter: one state for sign and plain momentum methods, two for
    Adam, three for AdEMAMix.
    """
    states = 3 if "ademamix" in name else 2 if "adam" in name or "lamb" in name else 1
    return states * (1 if "8bit" in name else 4)


def _row(recipe: Recipe, name: str, out_features: int, in_features: int, trained: bool = True) -> PlanRow:
    reason = recipe.quant.skip_reason(name, embedding=not trained)
    if reason is not None:
        return PlanRow(name, out_features, in_features, reason=reason)
    grid = recipe.quant.grid_for(name)
    base = empty_weight((out_features, in_features), grid, "meta")
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in base.to_tensors().items()}
    residual = sizes.pop("residual", 0)
    if not trained:
        return PlanRow(name, out_features, in_features, str(grid), None, sum(sizes.values()), residual)
    config = recipe.adapter
    if "init" in type(config).model_fields:
        config = config.model_copy(
            update={"init": "zero"}
        )  # the start of A and B does not change their shapes
    with torch.device("meta"):
        adapter = config.build(base)
    count = sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad) if config.trains(name) else 0
    return PlanRow(name, out_features, in_features, str(grid), None, sum(sizes.values()), residual, count)


def _activations(recipe: Recipe, shapes: Shapes, size: int) -> int:
    """Rough: what each decoder layer keeps for backward, and a chunk of logits, its gradient and some rows in fp32."""
    hidden = shapes.number("hidden_size", "n_embd") or 0
    layers = shapes.number("num_hidden_layers", "n_layer") or 0
    inner = shapes.number("intermediate_size", "ffn_dim") or 4 * hidden
    vocabulary = shapes.number("vocab_size") or 0
    tokens = recipe.train.micro_batch_size * recipe.data.sequence_len
    one_layer = (
        tokens * (10 * hidden + 4 * inner) * size
    )  # norms, q k v o, attention, residuals; gate, up, product, activation
    inputs = 0 if recipe.train.offload != "no" else layers * tokens * hidden * size
    kept = (
        inputs + one_layer
        if recipe.train.gradient_checkpointing
        else layers * one_layer
    )
    return kept + min(tokens * vocabulary, LOGITS_AT_A_TIME) * 2 * size + 12 * min(tokens * vocabulary, FLOATS_AT_A_TIME)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
