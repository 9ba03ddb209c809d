"""Checkpoints that a killed run can trust.

    checkpoints/step-00000100/ adapter.safetensors     the trained tensors, by parameter name
    optimizer.safetensors   "<parameter>/<key>" of the optimizer, and the generators' states as bytes
    ("rng/...") state.json              step, data position, numbers of the optimizer, best validation loss,
    what it belongs to manifest.json           sha256 and size of each of the above

Written to a folder whose name starts with ".tmp-", each file and the folder fsynced, then renamed: a
checkpoint under its own name is complete, whenever the process or the machine died. Removed the same way
round (renamed, then deleted). Read only after every hash agrees; one that does not is renamed to
"step-...corrupt", said so, and the one before it is used. Nothing here is a pickle: tensors are
safetensors, the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
ADAPTER, OPTIMIZER, STATE, MANIFEST = (
    "adapter.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Saved:
    """A checkpoint as read: trained tensors by parameter name, optimizer and generator tensors, and the
    JSON state.
    """

    path: Path
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. `folder` is made on the first save; leftovers of a killed run are removed
    there.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, max(1, keep)

    def steps(self) -> list[int]:
        """Steps that have a complete-looking checkpoint, rising."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of `step`."""
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        step: int,
        adapter: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict[str, Any],
        best: int | None,
    ) -> Path:
        """Write the checkpoint of `step`, then remove old ones: the newest `keep` and the one of step
        `best` stay.
        """
        with new_folder(self.path(step)) as temporary:
            save_file(adapter, temporary / ADAPTER)
            save_file(optimizer, temporary / OPTIMIZER)
            (temporary / STATE).write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")
            files = {name: _hash(temporary / name) for name in (ADAPTER, OPTIMIZER, STATE)}
            manifest = {"format": FORMAT, "step": step, "files": files}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for old in self.steps()[: -self.keep]:
            if old != best:
                _remove(self.path(old))
        return self.path(step)

    def clean(self) -> list[Path]:
        """Remove temporary folders that a killed run left; returns them."""
        left = sorted(self.folder.glob(".tmp-*")) if self.folder.is_dir() else []
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        return left

    def problem(self, step: int) -> str | None:
        """Why the checkpoint of `step` cannot be trusted, or None. Reads and hashes all of it."""
        path = self.path(step)
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                return f"{path / MANIFEST}: format {manifest['format']!r}; this version reads {FORMAT}"
            for name in (ADAPTER, OPTIMIZER, STATE):
                expected, found = manifest["files"][name], _hash(path / name)
                if found["bytes"] != expected["bytes"]:
                    return f"{path / name}: expected {expected['bytes']} bytes, has {found['bytes']}"
                if found["sha256"] != expected["sha256"]:
                    return f"{path / name}: damaged (its sha256 is not the one in {MANIFEST})"
        except OSError as error:
            return f"{error.filename}: {error.strerror}"
        except (ValueError, KeyError, TypeError) as error:
            return f"{path / MANIFEST}: damaged ({type(error).__name__}: {error})"
        return None

    def read(self, step: int) -> Saved:
        """The checkpoint of `step`. Raises ValueError, naming the file, if it is damaged."""
        if (problem := self.problem(step)) is not None:
            raise ValueError(problem)
        path = self.path(step)
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        return Saved(path, load_file(path / ADAPTER), load_file(path / OPTIMIZER), state)

    def newest_valid(self) -> int | None:
        """Step of the newest checkpoint whose hashes agree; nothing is changed on disk."""
        return next((step for step in reversed(self.steps()) if self.problem(step) is None), None)

    def newest(self) -> Saved | None:
        """The newest valid checkpoint. Damaged newer ones are named in a warning and renamed out of the
        way.
        """
        for step in reversed(self.steps()):
            problem = self.problem(step)
            if problem is None:
                return self.read(step)
            aside = _free_name(self.path(step).with_suffix(".corrupt"))
            self.path(step).rename(aside)
            warnings.warn(f"skipped a damaged checkpoint: {problem}. It is now {aside}", stacklevel=2)
        return None


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends without an error.

    Files are fsynced, then the folder is renamed over; a `target` that was there is replaced. On an error the
    temporary folder is removed and `target` is untouched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _free_name(target.parent / f".tmp-{target.name}")
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        if target.exists():
            _remove(target)
        temporary.rename(target)
        _fsync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(target: Path, text: str) -> None:
    """Replace the file `target` by `text`, atomically."""
    temporary = _free_name(target.parent / f".tmp-{target.name}")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    temporary.replace(target)
    _fsync(target.parent)


def rng_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of this process's generators: ({"cpu": uint8 [n], "cuda": uint8 [n]}, python's and numpy's as
    JSON).
    """
    tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy = [name, np.asarray(keys).tolist(), position, has_gauss, cached]
    return tensors, {"python": [version, list(words), gauss], "numpy": numpy}


def set_rng_state(tensors: dict[str, Tensor], numbers: dict[str, Any], device: torch.device) -> None:
    """Inverse of `rng_state`; a saved CUDA state is ignored on a CPU."""
    torch.set_rng_state(tensors["cpu"].clone())  # torch misreads a view that does not start its storage
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"].clone(), device)
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = numbers["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def _hash(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Delete a folder; renamed first, so that half of one never stands under a good name."""
    doomed = _free_name(path.parent / f".tmp-old-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _free_name(path: Path) -> Path:
    candidate, n = path, 1
    while candidate.exists():
        candidate, n = path.with_name(f"{path.name}-{n}"), n + 1
    return candidate
