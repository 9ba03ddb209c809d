"""Which tensors of a checkpoint's files make which parameter of the model.

Most often the names are equal. The rest is transformers' own business, so its own table decides: renames
between versions, the base-model prefix ("decoder." in a file, "model.decoder." in the model), per-expert
weights that are fused into one 3-D parameter, parameters that are tied.

Every tensor of the files is used, known to be harmless, or refused by name: a scale, a bias or a layer that
the model does not take would be lost in silence, and what is left of the weights would be others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..files.tensorfile import CheckpointError, TensorEntry, pieces
from ..names import listed
from .matrices import Matrix

# Buffers that older versions of transformers saved, and that models compute themselves now: rotary tables,
# position numbers, causal masks (a mask is square or a single number: `bias` of an attention is 4-D there).
_COMPUTED = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|cos_cached|sin_cached|position_ids|masked_bias|causal_mask)$"
)
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention)\.bias$")


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
    if matrix.transposed or matrix.conv or matrix.rows is not None:
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


def weight_sources(
    model: Any, entries: dict[str, TensorEntry], folder: Path, left: Callable[[str], bool] | None = None
) -> dict[str, Source]:
    """{model parameter: where its value comes from}, by transformers' own conversion table. left: whether a
    tensor that the model does not take may be left out; None: only what is known to be harmless is."""
    from transformers import conversion_mapping, core_model_loading

    state = model.state_dict(keep_vars=True)
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, core_model_loading.WeightConverter)]
    renames = [t for t in transforms if isinstance(t, core_model_loading.WeightRenaming)]
    prefix, by_pattern = model.base_model_prefix, {p: c for c in converters for p in c.source_patterns}
    plan: dict[str, Source] = {}
    strange: list[str] = []  # tensors that the model does not take
    for key in sorted(entries, key=core_model_loading.dot_natural_key):
        name, pattern = core_model_loading.rename_source_key(key, renames, converters, prefix, state)
        if name not in state:  # a rename that should not have fired
            name, pattern = core_model_loading.rename_source_key(key, [], [], prefix, state)
        if name not in state:
            strange.append(key)
            continue
        if state[name].is_floating_point() and not entries[key].dtype.is_floating_point:
            raise CheckpointError(
                f"{entries[key].file}: tensor {key!r} holds {str(entries[key].dtype)[6:]} integers, and the "
                f"model's {name!r} does not: these are codes of a quantized checkpoint, whose config.json "
                "has no quantization_config that says how to read them. Give the full-precision checkpoint."
            )
        converter = by_pattern[pattern] if pattern is not None else None
        plan.setdefault(name, Source([], name, converter)).keys.append((key, pattern or key))
    strange = [key for key in strange if left is None or not left(key)]
    _refuse_strangers(strange, entries, model, folder)
    for name, source in list(plan.items()):  # one file tensor that becomes several parameters
        first, *others = source.converter.target_patterns if source.converter is not None else [""]
        plan.update({name.replace(first, other): source for other in others})
    for names in _tied_groups(model):
        have = [name for name in names if name in plan]
        for name in have[1:]:
            _require_equal(entries, plan[have[0]].keys[0][0], plan[name].keys[0][0], folder)
        plan.update({name: plan[have[0]] for name in names if have})
    return plan


def _refuse_strangers(keys: list[str], entries: Mapping[str, TensorEntry], model: Any, folder: Path) -> None:
    """CheckpointError naming the tensors that the model does not take and that are not known to be harmless:
    buffers that it computes, what transformers itself leaves out for this model (draft layers of some), and
    biases of zero, which some quantizers write for every layer."""
    known = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    left = [
        key
        for key in keys
        if not (
            _COMPUTED.search(key)
            or _CAUSAL_MASK.search(key)
            and len(entries[key].shape) == 4
            or any(pattern.search(key) for pattern in known)
            or key.endswith(".bias")
            and all(not piece.any() for piece in pieces(entries[key]))
        )
    ]
    if not left:
        return
    kinds = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", key) for key in left)
    scaled = any(key.endswith(("_scale", "_scale_inv", ".SCB", "scales", "_zero_point")) for key in left)
    why = (
        "scales beside weights are those of a quantized checkpoint, whose config.json has no "
        "quantization_config that says how to read them; give the full-precision checkpoint"
        if scaled
        else "the files and config.json do not belong together; correct config.json, or take these tensors "
        "out of the files"
    )
    raise CheckpointError(
        f"{folder}: {len(left)} tensor{'s' * (len(left) > 1)} that a {type(model).__name__} of its "
        f"config.json does not take: {listed(list(kinds)[:8])}{' and more' if len(kinds) > 8 else ''} "
        f"(the first is {left[0]!r} in {entries[left[0]].file.name}): {why}"
    )


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
