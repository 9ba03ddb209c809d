"""reconstruct: adapters fitted to the dense layers before training; the state of each finished layer is kept.

    reconstruct/layer-00003/
        adapter.safetensors     the layer's adapter tensors, by PEFT key
        manifest.json           what it belongs to, its losses, the sha256 of the other and its own

Written aside and renamed whole, so a run that was killed goes on with the layer it was in, and ends with the
bytes of one that was not: a layer depends on the ones before it, on the text and on the seed alone. Finished
layers are computed through once more then, because the hidden states are not kept. Another recipe, or a
damaged file: that layer and all after it are fitted again.

With several processes the main one does this while the others wait; they read what it wrote.
"""

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.attach import base_digest
from ..files.atomic import free_name, recover_all, remove_folder, staged_folder, visible_names
from ..files.errors import writing
from ..files.manifest import changed_files, file_entry, open_sealed, sealed
from ..files.tensorfile import load_tensors, save_tensors
from ..model.walk import decoder_layers
from ..session import Session
from ..train.processes import main_process_first
from ..train.reconstruct import Fit, has_adapters, reconstruct
from .data import calibration_key, calibration_windows

FOLDER, ADAPTER, MANIFEST = "reconstruct", "adapter.safetensors", "manifest.json"


def reconstruct_stage(session: Session, model: Any) -> str | None:
    """Fit the adapters of `model` if the recipe says so; returns what identifies the result, or None."""
    recipe, run_dir = session.recipe, session.run
    section = recipe.train.reconstruct
    if section is None:
        return None
    if not has_adapters(model):
        raise ValueError(
            "train.reconstruct: no decoder layer has an adapter; choose other adapter.targets, or "
            "reconstruct: null"
        )
    key = reconstruct_key(session, model)
    with run_dir.stage("reconstruct", session.device, resumable=True), main_process_first():
        layers = decoder_layers(model)[1]
        kept = Kept(run_dir / FOLDER, key, run_dir.main)
        fits, states = kept.read(len(layers))
        if fits:
            session.say(f"reconstruct: {len(fits)} of {len(layers)} layers are there already")
        batches = (
            calibration_windows(session, section.samples, section.sequence_len, section.micro_batch_size)
            if len(fits) < len(layers)
            else []
        )
        began = time.perf_counter()
        for fit, state in reconstruct(
            model,
            session.folded,
            batches,
            section,
            seed=recipe.train.seed,
            device=session.device,
            dtype=session.dtype,
            attention=recipe.model.attention,
            done=states,
        ):
            session.check_files()
            kept.write(len(fits), fit, state)
            fits.append(fit)
            made = len(fits) - len(states)
            left = (time.perf_counter() - began) / made * (len(layers) - len(fits))
            session.say(progress(len(fits), len(layers), fit, left))
        run_dir.write_json("reconstruct.json", [asdict(fit) for fit in fits])
    return key


def progress(number: int, count: int, fit: Fit, left: float) -> str:
    """A line for a finished layer; left: seconds that the others will take."""
    told = (
        f"loss {fit.before:.5f} -> {fit.after:.5f} (step {fit.step})" if fit.trained else "no adapter in it"
    )
    return f"reconstruct: layer {number} of {count}  {told}  {fit.seconds:.0f} s, {left:.0f} s left"


def reconstruct_key(session: Session, model: Any) -> str:
    """What the result is a function of: base, adapters as they start, text, section, seed, and dtype."""
    recipe, section = session.recipe, session.recipe.train.reconstruct
    assert section is not None
    facts = {
        "base": base_digest(model),
        "adapter": recipe.adapter.model_dump(mode="json"),
        "reconstruct": section.model_dump(mode="json"),
        "text": calibration_key(session),
        "seed": recipe.train.seed,
        "dtype": recipe.model.dtype,
        "attention": recipe.model.attention,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Kept:
    """The folder of finished layers. main: whether this process may write and tidy up there."""

    def __init__(self, folder: Path, key: str, main: bool):
        self.folder, self.key, self.main = folder, key, main

    def path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}"

    def read(self, count: int) -> tuple[list[Fit], list[dict[str, Tensor]]]:
        """The finished layers from the first on, up to one that is missing, damaged or of another recipe; the
        rest is removed.
        """
        if self.main:
            recover_all(self.folder)
        fits: list[Fit] = []
        states: list[dict[str, Tensor]] = []
        for index in range(count):
            try:
                facts = open_sealed(self.path(index) / MANIFEST)
            except ValueError:
                break
            if facts.get("key") != self.key or changed_files(self.path(index), facts["files"]):
                break
            fits.append(Fit(**facts["fit"]))
            states.append(load_tensors(self.path(index) / ADAPTER))
        for index in range(len(fits), count) if self.main else ():
            self.clear(self.path(index))
        return fits, states

    @staticmethod
    def clear(path: Path) -> None:
        """Make room for a layer: what is there goes, unless somebody keeps other files in it."""
        if path.is_dir() and set(visible_names(path)) <= {ADAPTER, MANIFEST}:
            remove_folder(path)
        elif path.exists():
            path.rename(free_name(path.with_name(f"{path.name}.other")))

    def write(self, index: int, fit: Fit, state: dict[str, Tensor]) -> None:
        """FileError when the disk refuses."""
        with writing(self.path(index)), staged_folder(self.path(index)) as stage:
            save_tensors(stage / ADAPTER, state)
            facts = {"key": self.key, "fit": asdict(fit), "files": {ADAPTER: file_entry(stage / ADAPTER)}}
            (stage / MANIFEST).write_bytes(sealed(facts))
