"""Files of safetensors, written one tensor at a time.

The header of a file is known before any of its tensors is, so each tensor goes straight to its place; what
was handed to the disk is hashed, and read back at the end.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.atomic import is_same_file
from ..files.errors import FileError
from ..files.tensorfile import DTYPES
from .base import Exporter, Weights
from .folder import layer_digests, tensor_bytes
from .layout import Slot

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def header(slots: list[Slot], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for slot in slots:
        span = [offset, offset + slot.nbytes]
        entries[slot.key] = {
            "dtype": _DTYPE_NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": span,
        }
        offset += slot.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def data_offsets(slots: list[Slot], metadata: Mapping[str, str]) -> dict[str, int]:
    """Where each tensor begins in its file."""
    position, places = len(header(slots, metadata)), {}
    for slot in slots:
        places[slot.key] = position
        position += slot.nbytes
    return places


def write_shards(
    stage: Path,
    shards: Mapping[str, list[Slot]],
    dense: Callable[[Slot], Iterable[Tensor]],
    weights: Weights,
    exporter: Exporter,
    metadata: Mapping[str, str],
) -> dict[str, dict[str, str]]:
    """Headers, then tensors at their places, then all of it read back. Returns the digests of every layer.
    dense: the values of a tensor that is none of a layer, in pieces."""
    by_layer: dict[str | None, list[Slot]] = {}
    for slot in (slot for slots in shards.values() for slot in slots):
        by_layer.setdefault(slot.layer, []).append(slot)
    with ExitStack() as stack:
        files = [stack.enter_context(_Shard(stage / name, slots, metadata)) for name, slots in shards.items()]
        put = {slot.key: shard.put for shard in files for slot in shard.slots}

        def put_layer(name: str) -> dict[str, str]:
            """One layer; none of it is left when the next one is asked for."""
            weight, tensors = weights[name], {}
            for slot in by_layer[name]:
                if slot.part not in tensors:
                    first, last = (slot.part.first, slot.part.last) if slot.part else (0, weight.shape[0])
                    whole = last - first == weight.shape[0]
                    tensors = {slot.part: exporter.pack(weight if whole else weight.rows(first, last))}
                made = tensors[slot.part][slot.source]
                kept = made.to(slot.dtype)
                assert kept is made or torch.equal(kept.to(made.dtype), made), (
                    f"{slot.key}: {slot.dtype} cannot hold its values"
                )
                assert tuple(kept.shape) == slot.shape and kept.dtype == slot.dtype, slot
                put[slot.key](slot, [kept])
            return layer_digests(weight)

        digests = {name: put_layer(name) for name in weights}
        for slot in by_layer.get(None, []):
            put[slot.key](slot, dense(slot))
        for shard in files:
            shard.read_back()
    return digests


class _Shard:
    """One safetensors file while it is written: opened once, so that it stays this file whatever happens to
    its name, with the hash of every tensor that was put into it.
    """

    def __init__(self, path: Path, slots: list[Slot], metadata: Mapping[str, str]):
        self.path, self.slots = path, slots
        self.places = data_offsets(slots, metadata)
        self.digests: dict[str, str] = {}
        head = header(slots, metadata)
        self.file = path.open("w+b")
        self.file.write(head)
        self.file.truncate(len(head) + sum(slot.nbytes for slot in slots))

    def __enter__(self) -> "_Shard":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def put(self, slot: Slot, pieces: Iterable[Tensor]) -> None:
        sha, written = hashlib.sha256(), 0
        self.file.seek(self.places[slot.key])
        for piece in pieces:
            data = tensor_bytes(piece)
            written += self.file.write(data)
            sha.update(data)
        assert written == slot.nbytes, f"{slot}: {written} bytes"
        self.digests[slot.key] = sha.hexdigest()

    def read_back(self) -> None:
        """FileError naming the layer when the file does not hold what was put into it."""
        self.file.flush()
        self.file.seek(self.places[self.slots[0].key] if self.slots else 0)
        for slot in self.slots:
            sha, left = hashlib.sha256(), slot.nbytes
            while left and (data := self.file.read(min(left, 1 << 22))):
                sha.update(data)
                left -= len(data)
            if sha.hexdigest() != self.digests[slot.key]:
                raise FileError(
                    f"{self.path}: {slot.key} is not what was written a moment ago: another program writes "
                    "to this file, or the disk fails; nothing was replaced. Run the line again"
                )
        if not is_same_file(self.file.fileno(), self.path):
            raise FileError(
                f"{self.path}: was replaced by another program while it was written; nothing was replaced. "
                "Run the line again"
            )
