"""The tensors in the files of a checkpoint, by their names there, read one at a time.

`TensorFiles` is a folder and the headers of its safetensors files: which tensors there are and where each
one's bytes lie. Reading is plain file I/O through a small staging buffer that is checked for NaN/Inf and
copied straight to the wanted device and dtype. Not `safetensors.safe_open`: its tensors are views of a memory
map, whose pages count as our memory until the last view is gone (peak while reading a 1.07 GB checkpoint
whose largest tensor has 0.13 GB: 0.26 GB that way, 0.18 GB this way, in bf16; the gap is wider when
converting). So the most that is ever in memory is one tensor.

A checkpoint that is quantized already (GPTQ, AWQ, compressed-tensors: incoming/) looks the same from here:
its packed layers are dequantized one at a time where `read` is asked for their weight.

Checkpoints are data from a stranger: only safetensors and JSON are read, and every file name in the index
must lead to a file in the folder itself (hub.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.tensorfile import CheckpointError, TensorEntry, is_finite, pieces
from ..incoming import Incoming, collapse
from .hub import tensor_entries


class TensorFiles:
    """The tensor directory of a folder; holds no weights. Problems of the files are kept for `check`, so that
    all are reported at once.

    folder: resolved Path. quantization: quantization_config of its config.json, None when it has none.
    Attributes that others read: folder, entries (by tensor name), incoming (what was packed already, else
    None), given (values in memory of tensors that are not, or no longer, those of the files).
    """

    def __init__(self, folder: Path, quantization: Any = None) -> None:
        self.folder = folder
        self.given: dict[str, Tensor] = {}
        self.incoming: Incoming | None = None
        self.entries, self._problems = tensor_entries(folder)
        if quantization is not None and not self._problems:
            try:
                self.entries, self.incoming = collapse(quantization, self.entries)
            except ValueError as error:
                self._problems.append(f"{self.folder / 'config.json'}: {error}")

    def check(self) -> None:
        """Raise CheckpointError listing every problem that was found in the weight files, if any."""
        if self._problems:
            raise CheckpointError("\n".join(self._problems))

    def give(self, values: Mapping[str, Tensor]) -> None:
        """From here on the tensors of these names are these."""
        for name, value in values.items():
            value = value.detach().cpu().contiguous()
            size, shape = value.numel() * value.element_size(), tuple(value.shape)
            # the file is for messages, and for `fingerprint`, which has it anyway
            entry = TensorEntry(self.folder / "config.json", value.dtype, shape, 0, size)
            self.given, self.entries = {**self.given, name: value}, {**self.entries, name: entry}

    def names(self) -> list[str]:
        """The tensor names in the files, sorted."""
        return sorted(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor of that name in the files."""
        return self.entry(name).shape

    def stored_dtype(self, name: str) -> torch.dtype:
        """dtype of the tensor of that name in the files."""
        return self.entry(name).dtype

    def file(self, name: str) -> Path:
        """The file that holds the tensor of that name."""
        return self.entry(name).file

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(entry.nbytes for entry in self.entries.values())

    def fingerprint(self) -> list[list[Any]]:
        """[name, size, modification time] of every weight file and config.json: changes when one is
        replaced.
        """
        files = sorted({entry.file for entry in self.entries.values()} | {self.folder / "config.json"})
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]

    def read(
        self,
        name: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        row: int | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """The tensor called `name` in the files, contiguous, in its own memory, on `device`; with `row`, only
        tensor[row], with `rows` (first, last), only tensor[first:last].

        dtype None keeps the stored one; else floating tensors are converted on the way, 4 MB at a time, so a
        full-precision copy is never whole in memory. Raises CheckpointError for NaN or Inf, naming tensor and
        file.
        """
        entry = self.entry(name)
        packed = name.removesuffix(".weight")
        if self.incoming is not None and packed != name and packed in self.incoming.layers:
            whole = self.incoming.weight(packed, device=device)
            return (whole if rows is None else whole.rows(*rows)).dequantize(dtype or entry.dtype)
        skipped = 0  # elements before the part that is read
        if row is not None or rows is not None:
            first, last = rows if rows is not None else (row or 0, (row or 0) + 1)
            size, shape = entry.nbytes // entry.shape[0], (last - first, *entry.shape[1:])
            skipped = first * size // entry.dtype.itemsize
            shape = shape if rows is not None else shape[1:]
            entry = entry._replace(
                shape=shape, start=entry.start + first * size, nbytes=(last - first) * size
            )
        floating = entry.dtype.is_floating_point
        out = torch.empty(entry.shape, dtype=dtype if dtype and floating else entry.dtype, device=device)
        flat, position = out.view(-1), 0
        for piece in self._finite_pieces(name, entry, skipped):
            target = flat[position : position + piece.numel()].copy_(piece)
            if out.dtype is torch.float16 and not is_finite(target):
                raise CheckpointError(
                    f"{entry.file}: tensor {name!r} has values beyond float16 (65504); "
                    "set model.dtype: bfloat16"
                )
            position += piece.numel()
        return out

    def stored_pieces(self, name: str) -> Iterator[Tensor]:
        """The values of `read(name)` in order, flat, a few MB at a time; a piece is valid until the next is
        asked for.
        """
        packed = name.removesuffix(".weight")
        if self.incoming is not None and packed != name and packed in self.incoming.layers:
            return iter([self.read(name).view(-1)])
        return self._finite_pieces(name, self.entry(name))

    def _finite_pieces(self, name: str, entry: TensorEntry, skipped: int = 0) -> Iterator[Tensor]:
        position = 0
        for piece in self._pieces(name, entry):
            if entry.dtype.is_floating_point and not is_finite(piece):
                bad = skipped + position + int((~torch.isfinite(piece.float())).nonzero()[0])
                raise CheckpointError(
                    f"{entry.file}: tensor {name!r} of shape {list(self.shape(name))} has NaN or Inf "
                    f"(first at flat index {bad}). This checkpoint is damaged or badly converted: get it "
                    "again."
                )
            yield piece
            position += piece.numel()

    def _pieces(self, name: str, entry: TensorEntry) -> Iterator[Tensor]:
        if name not in self.given:
            yield from pieces(entry)
            return
        first, count = entry.start // entry.dtype.itemsize, entry.nbytes // entry.dtype.itemsize
        yield self.given[name].view(-1)[first : first + count]

    def entry(self, name: str) -> TensorEntry:
        self.check()
        if name not in self.entries:
            near = difflib.get_close_matches(name, self.entries, n=3, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise CheckpointError(f"{self.folder}: has no tensor {name!r}{hint}")
        return self.entries[name]
