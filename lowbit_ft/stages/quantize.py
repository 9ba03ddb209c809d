"""quantize: the packed base in base/, made once and then reused."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..adapters.attach import base_digest
from ..export import EXPORTERS, Weights
from ..export.folder import check_files
from ..export.writer import write_model
from ..files.atomic import free_name, remove_folder
from ..files.manifest import MANIFEST, open_sealed
from ..files.records import PackedBase
from ..kv_cache import bytes_per_token, cache_line, kv_config_of, reject_model
from ..quantize.quantize import Packing
from ..session import Session
from ..train.processes import main_process_first
from .activations import activations_key, settle_activations
from .data import calibration_batches, calibration_key
from .models import load_packed
from .rotations import rotation_file, turn, turned_keys


def quantize_stage(session: Session) -> Any:
    """The packed model: from base/ when it was made from this checkpoint with these settings, else packed now
    and kept.
    """
    run_dir = session.run
    key, folder = base_key(session), run_dir / "base"
    # A base that is about to be cut waits on the CPU, so that no device has to hold it whole.
    place = "cpu" if session.splits_base else None
    with run_dir.stage("quantize", session.device, resumable=True), main_process_first():
        stored = run_dir.read_json("base.json", PackedBase, PackedBase())
        if stored.key == key and folder.is_dir():
            try:
                check_files(folder)
                run_dir.refuse_other("base")
                model = open_base(session, folder, place)
                session.say(f"base: reusing {folder}")
                return model
            except ValueError as error:
                if not run_dir.main:  # the main one has just packed and checked it
                    raise
                session.say(f"base: {error}\nbase: packing it again")
                clear(session, folder)
        zeros = pack_base(session, folder)
        run_dir.made("base")
        settle_activations(session, folder, place)
        model = open_base(session, folder, place)
        facts = {"key": key, "digest": base_digest(model)}
        run_dir.write_json("base.json", facts if zeros is None else facts | {"zeros": zeros})
    return model


def open_base(session: Session, folder: Path, place: str | None) -> Any:
    """The packed model in base/, and from here on the session knows whether its files are still these."""
    opened = session.watch(folder)
    model = load_packed(folder, session, place)
    opened.check()
    if (line := cache_line(model, session.dtype)) is not None:
        session.say(line)
        ours, dense = bytes_per_token(model, 2)
        facts = {"grid": str(kv_config_of(model)), "bytes": ours, "dense": dense}
        session.run.write_json("kv_cache.json", facts)
    return model


def clear(session: Session, folder: Path) -> None:
    """Make room for a new base/ (or another folder of ours in a run): the one that is there is deleted,
    unless there are files in it that we did not write.
    """
    try:
        ours = {MANIFEST, *open_sealed(folder / MANIFEST).get("files", {})}
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    except ValueError:
        foreign = [MANIFEST]
    if not foreign:
        remove_folder(folder)
        return
    aside = folder.rename(free_name(folder.with_name(f"{folder.name}.damaged")))
    session.say(
        f"{folder.name}: the one before is kept as {aside} ({foreign[0]} is not a file that we wrote)"
    )


def pack_base(session: Session, folder: Path) -> float | None:
    """base/, written layer by layer as it is packed: neither the checkpoint nor the packed model is ever
    whole in memory. Returns the share of its weights that is locked at zero (None: no mask).
    """
    recipe, run_dir = session.recipe, session.run
    refuse_kv_cache(session)
    run_dir.write_json("base.json", {})  # a folder that is being replaced belongs to no key
    if recipe.quant.folds:
        session.turned = turn(session)
    packing = Packing(
        session.folded,
        recipe.quant,
        device=session.device,
        dtype=session.dtype,
        attention=recipe.model.attention,
        calibration=lambda: calibration_batches(session),
        console=session.console if run_dir.main else None,
    )
    weights = Weights(packing.layer_specs, packing.take)
    kv_cache = recipe.quant.kv_cache
    write_model(
        folder,
        session.folded,
        weights,
        EXPORTERS["native"],
        extra_files=rotation_file(session),
        kv_cache=None if kv_cache is None else kv_cache.config(turned_keys(session)),
    )
    session.say(packing.table)
    run_dir.write_json("quant.json", packing.table.to_json())
    return packing.table.zeros


def refuse_kv_cache(session: Session) -> None:
    """ValueError where the model's attention has no place for what the recipe says of keys and values."""
    section = session.recipe.quant.kv_cache
    model = session.checkpoint.empty_model(session.recipe.model.attention) if section is not None else None
    if section is not None and (problems := reject_model(model, section.config())):
        raise ValueError("quant.kv_cache: " + "; ".join(problems))


def base_key(session: Session) -> str:
    """What the base is made of: the checkpoint's files, the quant section, the text that its calibrator
    looks at, and what decides about its inputs.
    """
    quant = session.recipe.quant
    apart = {"activations", "kv_cache", *(() if quant.locks else ("sparsity",))}
    facts = {
        "quant": quant.model_dump(mode="json", exclude=apart),
        "files": session.checkpoint.revision or session.checkpoint.fingerprint(),
        "text": calibration_key(session) if quant.reads_rows else None,
    }
    if session.checkpoint.purpose is not None:  # its head and its labels lie in base/ too
        facts["task"] = [session.recipe.task.model_dump(mode="json"), session.checkpoint.purpose.seed]
    if quant.activations is not None:
        facts["activations"] = activations_key(session)
    if quant.kv_cache is not None:
        facts["kv_cache"] = quant.kv_cache.config().to_json()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
