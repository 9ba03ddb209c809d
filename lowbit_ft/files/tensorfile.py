"""The safetensors format, read without the tensors: headers that are checked, and bytes in small pieces.

Layout: 8 bytes header length (little endian), a JSON header {name: {dtype, shape, data_offsets}}, then the
data, whose offsets count from the end of the header. The library reads files through a memory map; here
plain reads go through one small staging buffer instead, because mapped pages count as the process's memory
(see model/load.py for the measurement), and because the checks below give a message with a file and a byte
count where the library says "invalid header".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import reading, writing
from .regular import open_regular

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
STAGE = 4 << 20  # bytes of the staging buffer: stays in the cache (16 MB reads at half the speed)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or tensor and says what to do."""


class TensorEntry(NamedTuple):
    """Where one tensor lies: `nbytes` bytes from `start` (absolute, in bytes) of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: str | Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: {name: {"dtype": str, "shape": [int], "data_offsets": [begin, end]}}.

    Checks that dtypes are known, that sizes equal shape x item size, and that the tensors fill the file
    exactly, so a truncated file is found here. Raises CheckpointError naming the file, the expected and the
    actual bytes.
    """
    return parse_header(Path(path))[1]


def parse_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """(bytes before the data, header) of a safetensors file; see `read_header`."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > _MAX_HEADER:
                raise CheckpointError(
                    f"{path}: not a safetensors file ({size} bytes, header length {length})"
                )
            if 8 + length > size:
                raise CheckpointError(
                    f"{path}: truncated in its header: expected at least {8 + length} bytes, has {size}"
                )
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except _Duplicate as error:
        raise CheckpointError(
            f"{path}: damaged header: {error} is there twice. Download or copy this file again."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file (its header is not JSON: {error})") from error
    except ValueError as error:  # a pipe or a device; or a number of thousands of digits
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: not a safetensors file (its header is a JSON {type(header).__name__})"
        )
    header.pop("__metadata__", None)
    end = 0
    for name, entry in sorted(header.items(), key=_offset_of):
        try:
            begin, stop = entry["data_offsets"]
            shape, dtype = entry["shape"], entry["dtype"]
            if not all(type(v) is int and v >= 0 for v in (*shape, begin, stop)):
                raise TypeError("shape and offsets must be integers >= 0")
            if not isinstance(dtype, str):
                raise TypeError("dtype must be text")
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged header entry of tensor {name!r} ({error})") from error
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {dtype!r}; known: {', '.join(DTYPES)}. "
                "Is this a checkpoint that is already quantized? Use the full-precision one."
            )
        if stop - begin != math.prod(shape) * DTYPES[dtype].itemsize or begin != end:
            raise CheckpointError(
                f"{path}: damaged header: tensor {name!r} of shape {shape} and dtype {dtype} "
                f"cannot lie in bytes {begin}:{stop} (the tensor before it ends at {end})"
            )
        end = stop
    if 8 + length + end != size:
        what = "truncated" if size < 8 + length + end else "too long"
        raise CheckpointError(
            f"{path}: {what}: expected {8 + length + end} bytes, has {size}. "
            "Download or copy this file again."
        )
    return 8 + length, header


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name, in this process's memory. ValueError naming the file and
    what is wrong with it."""
    read_header(path)  # its messages say more than the library's
    with reading(path):
        return load_file(path)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a new safetensors file. FileError naming it when the disk refuses."""
    with writing(path):
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))


class _Duplicate(Exception):
    """A JSON object with the same key twice: readers differ in which one they believe."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Duplicate(repr(next(name for name in names if names.count(name) > 1)))
    return found


def _offset_of(item: tuple[str, Any]) -> tuple[int, int]:
    try:
        begin, end = item[1]["data_offsets"]
        return int(begin), int(end)
    except (TypeError, KeyError, ValueError, OverflowError):  # 1e400 is infinity to JSON
        return -1, -1  # first, where the caller reports it


def pieces(entry: TensorEntry) -> Iterator[Tensor]:
    """The tensor's values in order, flat, in its stored dtype; a piece is valid until the next is asked
    for.
    """
    stage = torch.empty(min(STAGE, max(entry.nbytes, 1)), dtype=torch.uint8)
    window = memoryview(stage.numpy())  # pyright: ignore[reportArgumentType]  (an array is a buffer)
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start)
        left = entry.nbytes
        while left:
            size, got = min(len(window), left), 0
            while got < size:
                read = file.readinto(window[got:size])
                if not read:
                    raise CheckpointError(
                        f"{entry.file}: ended while it was read; it changed since it was opened"
                    )
                got += read
            left -= size
            yield stage[:size].view(entry.dtype)


def is_finite(piece: Tensor) -> bool:
    """Whether a floating tensor (any shape) has no NaN and no Inf."""
    piece = piece if piece.dtype.itemsize > 1 else piece.float()
    # NaN and Inf survive a sum, which is one fast pass; the exact test runs only if the sum overflowed.
    total = piece.sum(dtype=torch.promote_types(piece.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(piece).all())


def read_tensor(entry: TensorEntry, device: str | torch.device = "cpu") -> Tensor:
    """One tensor in its stored dtype, in its own memory."""
    out = torch.empty(entry.shape, dtype=entry.dtype, device=device)
    flat, position = out.view(-1), 0
    for piece in pieces(entry):
        flat[position : position + piece.numel()].copy_(piece)
        position += piece.numel()
    return out
