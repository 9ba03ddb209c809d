"""write_model: a complete Hugging Face folder from a checkpoint and packed layers, with one tensor in memory
at a time.

Every shape and dtype is known from the specs, so the headers of all shards are written first and each tensor
goes straight to its final place in its file. Packed layers come from `weights`; everything else is copied
from the checkpoint in the dtype it is stored in. config.json's dtype becomes the one the model was trained
in, because that is the dtype in which what ships is what was trained.

The folder is there whole or not at all, and takes the place of another only when we wrote all of that one
(folder.py). Before that it is read back: every tensor in its file must have the hash of what was handed to
the disk, so neither a failing disk nor another program that writes there ships another model.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files.atomic import staged_folder
from ..files.errors import writing
from ..files.manifest import MANIFEST, file_entry, sealed
from ..grid import Weight
from ..kv_cache import KVConfig
from ..model.checkpoint import Checkpoint
from ..model.shipped import ShippedCheckpoint
from ..names import without_folders
from .base import Exporter, LayerSpec, Weights
from .chat import chat_files
from .folder import (
    check_extra,
    check_files,
    check_space,
    check_target,
    copied_files,
    layer_digests,
    read_manifest,
    replace_file,
    tensor_bytes,
    write_json,
)
from .gguf_file import GgufFile
from .layout import Layout, Slot
from .onnx_file import OnnxFiles
from .planes import as_integers, held
from .shards import write_shards

__all__ = [
    "CONTAINERS",
    "MAX_SHARD_BYTES",
    "check_files",
    "layer_digests",
    "read_manifest",
    "replace_file",
    "write_model",
]

MAX_SHARD_BYTES = (
    5_000_000_000  # as transformers' own save_pretrained (5GB of its docs; file systems and the hub like it)
)


def write_model(
    folder: str | Path,
    checkpoint: Checkpoint,
    weights: Mapping[str, Weight],
    exporter: Exporter,
    *,
    kv_cache: KVConfig | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    before_it_counts: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Write `folder` and return its manifest (the content of lowbit_ft.json).

    weights: layer name in the model -> weight; a `Weights` is read one layer at a time. kv_cache: what keys
    and values are on, for formats that say it (others leave it to the server's flag). extra_files: name ->
    content of further files (README.md, recipe.yaml). before_it_counts: called when all is written, before it
    takes its place; what it raises leaves `folder` as it was. Raises ValueError before anything is written
    when the format cannot hold a layer, a layer is not one of the checkpoint's, the disk is too small, or the
    folder exists and is not wholly ours; FileError when the disk refuses, or does not hold what was written.
    """
    folder, stream = Path(folder), as_integers(Weights.of(weights), exporter)
    check_target(folder)
    extra = check_extra(extra_files or {})
    layout = check_model(checkpoint, stream.specs, exporter)
    files = CONTAINERS[exporter.container](layout, checkpoint, exporter, max_shard_bytes)
    chat = chat_files(checkpoint.folder, checkpoint.chat_template)
    copied = [path for path in copied_files(checkpoint.folder) if path.name not in chat]
    made = {name: content for name, content in chat.items() if content is not None}
    if clash := sorted(({path.name for path in copied} | made.keys()) & set(extra)):
        raise ValueError(
            f"extra file {clash[0]!r}: the checkpoint has a file of this name, which is part of the model"
        )
    size = files.nbytes + sum(len(c) for c in (*extra.values(), *made.values()))
    size += sum(path.stat().st_size for path in copied) + (1 << 20)
    check_space(folder, size)

    with writing(folder), staged_folder(folder) as stage:
        digests = files.write(stage, stream)
        config = layout.config(checkpoint)
        if kv_cache is not None and exporter.carries_kv_cache:
            config["quantization_config"]["kv_cache"] = kv_cache.to_json()
        write_json(stage / "config.json", config)
        for path in copied:
            shutil.copyfile(path, stage / path.name)
        for name, content in {**made, **extra}.items():
            (stage / name).write_bytes(content)
        manifest = {
            "writer": "lowbit_ft",
            "version": 1,
            "format": exporter.name,
            "source": {"path": _source(checkpoint.source), "revision": checkpoint.revision},
            "files": {path.name: file_entry(path) for path in sorted(stage.iterdir())},
            "layers": {
                name: {"grid": str(spec), "stored_as": layout.prefixes[name], "sha256": digests[name]}
                for name, spec in stream.specs.items()
            },
        }
        if isinstance(checkpoint, ShippedCheckpoint):
            manifest["trained"] = trained_facts(checkpoint, layout)
        (stage / MANIFEST).write_bytes(sealed(manifest))
        if before_it_counts is not None:
            before_it_counts()
    return manifest


def _source(given: str) -> str:
    """What the model was made of, for everybody who gets the folder: of a path of this machine the name,
    which is no hub id with its "./"."""
    name = without_folders(given)
    return name if name == given else f"./{name}"


def check_model(checkpoint: Checkpoint, layers: Mapping[str, LayerSpec], exporter: Exporter) -> Layout:
    """Where everything will lie in the files. ValueError when the format cannot hold these layers of this
    checkpoint: worth asking before they are trained."""
    if not layers:
        raise ValueError(f"{checkpoint.source}: there is no packed layer to write")
    layers = {name: replace(spec, grid=held(exporter, spec.grid)) for name, spec in layers.items()}
    if reason := exporter.missing(exporter.writes_with):
        raise ValueError(f"{exporter.name} {reason}")
    problems = exporter.reject_model(layers) + exporter.reject_checkpoint(
        checkpoint.config.to_dict(), checkpoint.folder
    )
    if checkpoint.online_layers and exporter.no_online is not None:
        problems.append(
            f"{checkpoint.online_layers[0]}: a Hadamard stays before it at inference "
            f"(quant.rotation.sites.r4), and {exporter.name} {exporter.no_online}; set r4: false, or "
            "export.format: native"
        )
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    by_dtype = {spec.grid: name for name, spec in layers.items()}
    problems += [
        f"{name}: {reason}"
        for grid, name in by_dtype.items()
        if (reason := exporter.reject_dtype(grid, dtype))
    ]
    if problems:
        raise ValueError(f"{exporter.name} cannot hold this model:\n  " + "\n  ".join(problems))
    return Layout(checkpoint, layers, exporter)


def trained_facts(checkpoint: ShippedCheckpoint, layout: Layout) -> dict[str, dict[str, str]]:
    """Of every dense tensor that was trained: its name in the files, and the sha256 of its bytes as it ships
    (formats may keep them in another order, or wider)."""
    stored = {slot.source: slot.key for slot in layout.slots if slot.layer is None}
    return {
        name: {
            "stored_as": stored[checkpoint.keys_for(name)[0]],
            "sha256": hashlib.sha256(tensor_bytes(trained.value())).hexdigest(),
        }
        for name, trained in checkpoint.trained.items()
    }


def check_writable(checkpoint: Checkpoint, layers: Mapping[str, LayerSpec], exporter: Exporter) -> None:
    """`check_model`, and what only a plan of the files finds out: a name that gguf has not, a forward that
    cannot be traced for onnx."""
    layout = check_model(checkpoint, layers, exporter)
    CONTAINERS[exporter.container](layout, checkpoint, exporter, MAX_SHARD_BYTES)


class _SafetensorsFiles:
    """The container of most formats: model.safetensors, or numbered shards with their index. `nbytes` is what
    it needs on the disk; `write` makes it and returns the digests of every layer."""

    def __init__(self, layout: Layout, checkpoint: Checkpoint, exporter: Exporter, max_shard_bytes: int):
        self.shards = _shards(layout.slots, max_shard_bytes)
        self.metadata = {"format": "pt"} | exporter.file_metadata(layout.layers, checkpoint.dtype)
        self.checkpoint, self.exporter = checkpoint, exporter

    @property
    def nbytes(self) -> int:
        metadata = len(self.shards) * len(json.dumps(self.metadata))
        return metadata + sum(slot.nbytes + 200 for slots in self.shards.values() for slot in slots)

    def write(self, stage: Path, weights: Weights) -> dict[str, dict[str, str]]:
        digests = write_shards(
            stage,
            self.shards,
            lambda slot: self.checkpoint.stored_pieces(slot.source),
            weights,
            self.exporter,
            self.metadata,
        )
        _write_index(stage, self.shards)
        return digests


CONTAINERS = {"safetensors": _SafetensorsFiles, "gguf": GgufFile, "onnx": OnnxFiles}  # by Exporter.container


def _shards(slots: list[Slot], max_bytes: int) -> dict[str, list[Slot]]:
    """File name -> its tensors, in model order over the files; in a file the widest dtypes first, so that
    each is aligned.
    """
    parts: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        if parts[-1] and filled + slot.nbytes > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(slot)
        filled += slot.nbytes
    ordered = [sorted(part, key=lambda slot: (-slot.dtype.itemsize, slot.key)) for part in parts]
    if len(ordered) == 1:
        return {"model.safetensors": ordered[0]}
    return {f"model-{i:05}-of-{len(ordered):05}.safetensors": part for i, part in enumerate(ordered, 1)}


def _write_index(stage: Path, shards: Mapping[str, list[Slot]]) -> None:
    if len(shards) > 1:
        total = sum(slot.nbytes for slots in shards.values() for slot in slots)
        where = {slot.key: name for name, slots in shards.items() for slot in slots}
        write_json(
            stage / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
        )
