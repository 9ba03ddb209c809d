"""Checkpoints that a killed run can trust.

    checkpoints/step-00000100/
        adapter.safetensors     the trained tensors, by parameter name
        optimizer.safetensors   "<parameter>/<key>" of the optimizer, and the generators' states ("rng/...")
        state.json              step, data position, best validation loss, what it belongs to
        manifest.json           sha256 and size of each of the above, and its own (files/manifest.py)

Written aside and renamed whole (files/atomic.py): a checkpoint under its own name is complete, whenever the
process or the machine died, and an old one that goes is renamed before it is deleted. Read only after every
hash agrees; one that does not is renamed to "step-...corrupt", said so, and the one before it is used.
Nothing here is a pickle: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files.atomic import free_name, recover_all, remove_folder, staged_folder
from ..files.errors import writing
from ..files.jsonfile import read_json
from ..files.manifest import file_entry, open_sealed, sealed
from ..files.tensorfile import load_tensors, save_tensors

FORMAT = 1
ADAPTER, OPTIMIZER, STATE, MANIFEST = (
    "adapter.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
FILES = (ADAPTER, OPTIMIZER, STATE, MANIFEST)
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
        `best` stay, and so does one in which somebody keeps other files. FileError when the disk refuses.
        """
        with writing(self.path(step)), staged_folder(self.path(step)) as stage:
            save_tensors(stage / ADAPTER, adapter)
            save_tensors(stage / OPTIMIZER, optimizer)
            (stage / STATE).write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")
            files = {name: file_entry(stage / name) for name in (ADAPTER, OPTIMIZER, STATE)}
            manifest = {"format": FORMAT, "step": step, "files": files}
            (stage / MANIFEST).write_bytes(sealed(manifest))
        for old in self.steps()[: -self.keep]:
            if old != best and {path.name for path in self.path(old).iterdir()} <= set(FILES):
                remove_folder(self.path(old))
        return self.path(step)

    def clean(self) -> None:
        """Settle what a killed run left half written or half deleted."""
        recover_all(self.folder)

    def problem(self, step: int) -> str | None:
        """Why the checkpoint of `step` cannot be trusted, or None. Reads and hashes all of it."""
        path = self.path(step)
        try:
            manifest = open_sealed(path / MANIFEST)
            if manifest["format"] != FORMAT:
                return f"{path / MANIFEST}: format {manifest['format']!r}; this version reads {FORMAT}"
            for name in (ADAPTER, OPTIMIZER, STATE):
                expected, found = manifest["files"][name], file_entry(path / name)
                if found["bytes"] != expected["bytes"]:
                    return f"{path / name}: expected {expected['bytes']} bytes, has {found['bytes']}"
                if found["sha256"] != expected["sha256"]:
                    return f"{path / name}: damaged (its sha256 is not the one in {MANIFEST})"
        except OSError as error:
            return f"{error.filename}: {error.strerror}"
        except ValueError as error:
            return str(error)
        except (KeyError, TypeError) as error:
            return f"{path / MANIFEST}: damaged ({type(error).__name__}: {error})"
        return None

    def read(self, step: int) -> Saved:
        """The checkpoint of `step`. Raises ValueError, naming the file, if it is damaged."""
        if (problem := self.problem(step)) is not None:
            raise ValueError(problem)
        path = self.path(step)
        state = read_json(path / STATE, dict[str, Any])
        return Saved(path, load_tensors(path / ADAPTER), load_tensors(path / OPTIMIZER), state)

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
            aside = free_name(self.path(step).with_suffix(".corrupt"))
            self.path(step).rename(aside)
            warnings.warn(f"skipped a damaged checkpoint: {problem}. It is now {aside}", stacklevel=2)
        return None


def saved_tensors(model: nn.Module, homes: Iterable[str]) -> dict[str, Tensor]:
    """What a checkpoint holds of the model, by name, as it lies there now: the parameters and the persistent
    buffers of these modules, those in which something trains."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()  # a tied parameter is held once
    for home in homes:
        module = model.get_submodule(home)
        buffers = [
            b for b in module.named_buffers(recurse=False) if b[0] not in module._non_persistent_buffers_set
        ]
        for name, tensor in [*module.named_parameters(recurse=False), *buffers]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                out[f"{home}.{name}" if home else name] = tensor
    return out


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
