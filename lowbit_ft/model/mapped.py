"""Mapped: the packed base as pages of its file, not as memory of this process.

safetensors maps a file privately, and transformers keeps what needs no conversion as views of that map. So on
a CPU a packed model that was read from base/ has no copy of its integers: they are pages of the file, which
all processes of a machine share and which the system takes back when memory is short. They are copy-on-write:
who writes to one gets a page of its own, the file never changes. Only whole files are mapped: headers are
compared with the file's size before (tensorfile.parse_header), hashes by `check_files`, and our writers never
change a file in place, they rename a new one over it. What other programs do to it meanwhile,
files/opened.py sees: a run asks it at the end of every step.

On the way to a GPU each tensor's pages are given back as soon as it is there (`to_device`), so that CPU
memory stays free too.
"""

import ctypes
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MAPS = Path("/proc/self/smaps")
_DONTNEED = (
    4  # madvise: the pages may go; of a private map of a file nothing is lost but what was written to it
)


class Range(NamedTuple):
    """A part of the address space that is a map of `file`. resident: its bytes in memory; own: those of them
    that are this process's alone, because it wrote to them."""

    first: int
    last: int
    file: Path
    resident: int = 0
    own: int = 0


def mapped_ranges(folder: str | Path) -> list[Range]:
    """Where the safetensors files of a folder are mapped in this process (empty where the system does not
    tell: not Linux).
    """
    root, found, current = Path(folder).resolve(), [], None
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            path = Path(line.split(maxsplit=5)[5]) if line.count("/") else Path()
            first, last = (int(part, 16) for part in key.split("-"))
            current = (
                Range(first, last, path) if path.suffix == ".safetensors" and path.parent == root else None
            )
            if current is not None:
                found.append(current)
        elif current is not None and key in ("Rss:", "Anonymous:"):
            field = "resident" if key == "Rss:" else "own"
            current = found[-1] = current._replace(**{field: int(rest.split()[0]) * 1024})
    return found


def is_mapped(tensor: Tensor, ranges: list[Range]) -> bool:
    """Whether all of a CPU tensor lies in one of the maps."""
    first = tensor.data_ptr()
    last = first + tensor.numel() * tensor.element_size()
    return any(r.first <= first and last <= r.last for r in ranges)


def to_device(model: Any, device: torch.device | str, folder: str | Path) -> Any:
    """Move a model that was read from `folder` on the CPU, one tensor at a time, giving back the pages of
    each. Returns it.
    """
    ranges = mapped_ranges(folder)

    def move(tensor: Tensor) -> Tensor:
        there = tensor.to(device)
        if there is not tensor and not there.is_meta and is_mapped(tensor, ranges):
            _give_back(tensor)
        return there

    for module in model.modules():
        module._apply(move, recurse=False)
    return model


def _give_back(tensor: Tensor) -> None:
    """Take the pages of a mapped tensor out of this process. They come back from the file when somebody looks
    again.
    """
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONTNEED)
