"""merge: what the adapters trained, written as plain packed integers.

The codes are made by the same op in the same dtype as in the training forward, so nothing is rounded anew and
nothing is lost (`lora`, whose product is not on the grid, says so itself). A GPU and a CPU may round a tie
differently: `train` therefore writes the merged folder on the device it trained on, and `verify_merge` tells,
for a merge made elsewhere, how many codes differ.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .activations.place import scheme_of, shipped_of
from .adapters.attach import packed_layers
from .export import EXPORTERS, LayerSpec, Weights
from .export.reader import read_weights
from .export.writer import MAX_SHARD_BYTES, write_model
from .grid import PackedWeight, Weight
from .kv_cache import kv_config_of
from .model.checkpoint import Checkpoint
from .model.fused import part_rows
from .model.linear import PackedLinear
from .model.shipped import as_shipped, trained_tensors


def base_weights(model: nn.Module) -> Weights:
    """The packed bases as they are, residual included: what `base/` of a run holds."""
    layers, parts = dict(packed_layers(model)), part_rows(model)
    specs = {
        name: replace(LayerSpec.of(layer.base), activation=scheme_of(layer), rows=parts.get(name))
        for name, layer in layers.items()
    }
    return Weights(specs, lambda name: layers[name].base)


def merged_weights(model: nn.Module) -> Weights:
    """Layer name -> deployable weight: the adapter's merge, or the base without its residual where there is
    no adapter. Merged on access, one layer at a time, on the layer's device."""
    layers, parts = dict(packed_layers(model)), part_rows(model)
    specs = {name: replace(_spec_of(layer), rows=parts.get(name)) for name, layer in layers.items()}
    return Weights(specs, lambda name: merged_weight(layers[name]))


def merged_weight(layer: PackedLinear) -> Weight:
    return layer.base.without_residual() if layer.adapter is None else layer.adapter.merge(layer.base)


def _spec_of(layer: PackedLinear) -> LayerSpec:
    """What `merged_weight` will be, without computing it."""
    base = replace(LayerSpec.of(layer.base.without_residual()), activation=shipped_of(layer))
    if layer.adapter is None:
        return base
    config: Any = layer.adapter.config
    offset = base.offset or config.ships_offset
    return replace(base, grid=config.shipped(layer.grid), offset=offset)


def shipped(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the dense tensors that the model has trained: where whatever is not packed is
    read from when the model is written."""
    return as_shipped(checkpoint, trained_tensors(model))


def merge(
    model: nn.Module,
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    readme: str | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    before_it_counts: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Write the merged model as a native folder and return its manifest (lowbit_ft.json: sha256 of every file
    and of every layer's tensors). ValueError as `write_model`."""
    extra = dict(extra_files or {})
    checkpoint = shipped(model, checkpoint)
    if readme is not None:
        extra["README.md"] = readme
    return write_model(
        folder,
        checkpoint,
        merged_weights(model),
        EXPORTERS["native"],
        kv_cache=kv_config_of(model),
        extra_files=extra,
        max_shard_bytes=max_shard_bytes,
        before_it_counts=before_it_counts,
    )


@dataclass(frozen=True)
class MergeRow:
    """One layer: how many of its codes, and of its other numbers (scales, zero points, offsets), are not the
    written ones.
    """

    layer: str
    codes: int
    different_codes: int
    different_scales: int


@dataclass(frozen=True)
class MergeReport:
    rows: list[MergeRow]

    @property
    def exact(self) -> bool:
        return not self.different

    @property
    def different(self) -> list[MergeRow]:
        return [row for row in self.rows if row.different_codes or row.different_scales]

    def __str__(self) -> str:
        codes, changed = sum(row.codes for row in self.rows), sum(row.different_codes for row in self.rows)
        if self.exact:
            return (
                f"merge: all {codes:,} codes and every scale of {len(self.rows)} layers are the written ones"
            )
        scales = sum(row.different_scales for row in self.rows)
        lines = [
            f"merge: {changed:,} of {codes:,} codes ({changed / codes:.2e}) and {scales:,} scales in "
            f"{len(self.different)} of "
            f"{len(self.rows)} layers are not the written ones"
        ]
        lines += [
            f"  {row.layer}: {row.different_codes:,} codes, {row.different_scales:,} scales"
            for row in self.different[:20]
        ]
        return "\n".join(lines + ["  ..."] * (len(self.different) > 20))


def verify_merge(model: nn.Module, folder: str | Path) -> MergeReport:
    """Merge again, layer by layer, and count what differs from the native folder that was written. Nothing is
    written.

    ValueError when the folder holds other layers or other grids.
    """
    ours, written = merged_weights(model), read_weights(folder)
    if ours.specs != written.specs:
        names = sorted(name for name in {*ours, *written} if ours.specs.get(name) != written.specs.get(name))
        raise ValueError(
            f"{folder}: holds another model: {len(names)} layers differ in grid or shape, such as {names[0]} "
            f"({written.specs.get(names[0], 'absent')} there, {ours.specs.get(names[0], 'absent')} here)"
        )
    rows = []
    for name, spec in ours.specs.items():
        mine, theirs = ours[name], written[name]
        a, b = mine.to_tensors(), theirs.to_tensors()
        others = sum(_differences(a[key], b[key]) for key in a if key not in ("codes", "planes"))
        codes = spec.elements * (1 if isinstance(mine, PackedWeight) else spec.grid.bits)
        rows.append(MergeRow(name, codes, different_codes(mine, theirs), others))
    return MergeReport(rows)


def moved(model: nn.Module) -> dict[str, float]:
    """What training moved: {layer: share of its codes that are not the base's}, and "scale_change", mean |s /
    s0 - 1| over all groups (0 for a layer without an adapter)."""
    out, change, groups = {}, 0.0, 0
    for name, layer in packed_layers(model):
        base, weight = layer.base, merged_weight(layer)
        out[name] = different_codes(base, weight) / base.unpack_codes().numel()
        old, new = base.scale.float(), weight.scale.float()
        change += float(
            (new / old - 1).abs()[old != 0].sum()
        )  # an alternating fit may give a plane no weight at all
        groups += old.numel()
    return {**out, "scale_change": change / max(1, groups)}


def different_codes(a: Weight, b: Weight) -> int:
    """How many codes (bits of planes) of two weights of one shape differ."""
    name = "codes" if isinstance(a, PackedWeight) else "planes"
    if torch.equal(a.to_tensors()[name].cpu(), b.to_tensors()[name].cpu()):
        return 0  # without unpacking them
    return _differences(a.unpack_codes(), b.unpack_codes())


def _differences(a: Tensor, b: Tensor) -> int:
    return int((a.cpu() != b.cpu()).sum())
