"""Which tensors of a checkpoint's files make which parameter of the model.

Most often the names are equal. The rest is transformers' own business, so its own table decides: renames
between versions, the base-model prefix ("decoder." in a file, "model.decoder." in the model), per-expert
weights that are fused into one 3-D parameter, parameters that are tied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..files.tensorfile import CheckpointError, TensorEntry, pieces
from .matrices import Matrix


class Source(NamedTuple):
    """Where a model parameter's value comes from: [(file tensor, pattern)], and a converter if they must be
    combined.
    """

    keys: list[tuple[str, str]]
    first: str
    converter: Any | None


class Part(NamedTuple):
    """Rows [first, last) of a matrix, and the file tensor that holds them."""

    key: str
    first: int
    last: int


def expert_keys(source: Source, expert: int, count: int) -> list[tuple[str, str]] | None:
    """The (file tensor, pattern) pairs of one expert of `count`; None when the files do not keep one tensor
    per expert.
    """
    by_pattern: dict[str, list[str]] = {}
    for key, pattern in source.keys:  # in the order of the expert's number
        by_pattern.setdefault(pattern, []).append(key)
    if source.converter is None or any(len(keys) != count or "*" not in p for p, keys in by_pattern.items()):
        return None
    order = [pattern for pattern in source.converter.source_patterns if pattern in by_pattern]
    return [(by_pattern[pattern][expert], pattern) for pattern in order]


def file_parts(matrix: Matrix, source: Source, entries: dict[str, TensorEntry]) -> list[Part] | None:
    """The file tensors that, one below the other, are the matrix; None when it is kept in another way."""
    if matrix.transposed:
        return None
    keys = [key for key, _ in source.keys] if source.converter is None else None
    if source.converter is not None and matrix.expert is not None:
        plain = len(source.converter.operations) <= 2 and all(
            type(operation).__name__ == kind and operation.dim == dim
            for operation, (kind, dim) in zip(
                source.converter.operations, (("MergeModulelist", 0), ("Concatenate", 1)), strict=False
            )
        )
        numbers = len(source.keys) // len({pattern for _, pattern in source.keys})
        pairs = expert_keys(source, matrix.expert, numbers)
        keys = [key for key, _ in pairs] if plain and pairs else None
    if keys is None or any(len(entries[key].shape) != 2 or not key.endswith(".weight") for key in keys):
        return None
    parts, row = [], 0
    for key in keys:
        parts.append(Part(key, row, row + entries[key].shape[0]))
        row = parts[-1].last
    return parts if row == matrix.shape[0] else None


def weight_sources(model: Any, entries: dict[str, TensorEntry], folder: Path) -> dict[str, Source]:
    """{model parameter: where its value comes from}, by transformers' own conversion table."""
    from transformers import conversion_mapping, core_model_loading

    state = model.state_dict(keep_vars=True)
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, core_model_loading.WeightConverter)]
    renames = [t for t in transforms if isinstance(t, core_model_loading.WeightRenaming)]
    prefix, by_pattern = model.base_model_prefix, {p: c for c in converters for p in c.source_patterns}
    plan: dict[str, Source] = {}
    for key in sorted(entries, key=core_model_loading.dot_natural_key):
        name, pattern = core_model_loading.rename_source_key(key, renames, converters, prefix, state)
        if name not in state:  # a rename that should not have fired
            name, pattern = core_model_loading.rename_source_key(key, [], [], prefix, state)
        if name not in state:
            continue  # tensors the model does not use (old rotary buffers, extra heads)
        converter = by_pattern[pattern] if pattern is not None else None
        plan.setdefault(name, Source([], name, converter)).keys.append((key, pattern or key))
    for name, source in list(plan.items()):  # one file tensor that becomes several parameters
        first, *others = source.converter.target_patterns if source.converter is not None else [""]
        plan.update({name.replace(first, other): source for other in others})
    for names in _tied_groups(model):
        have = [name for name in names if name in plan]
        for name in have[1:]:
            _require_equal(entries, plan[have[0]].keys[0][0], plan[name].keys[0][0], folder)
        plan.update({name: plan[have[0]] for name in names if have})
    return plan


def _require_equal(entries: dict[str, TensorEntry], a: str, b: str, folder: Path) -> None:
    """Tied in config.json but stored twice: only fine when the two are the same."""
    first, second = entries[a], entries[b]
    alike = first.shape == second.shape and first.dtype == second.dtype
    if alike and all(torch.equal(x, y) for x, y in zip(pieces(first), pieces(second), strict=True)):
        return
    raise CheckpointError(
        f"{folder}: config.json ties {a!r} to {b!r}, but the files hold different values for them; "
        'set "tie_word_embeddings": false in config.json'
    )


def _tied_groups(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one object, two or more each."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]
