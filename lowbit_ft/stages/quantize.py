"""quantize: the packed base in base/, made once and then reused."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ..adapters.attach import base_digest
from ..export import EXPORTERS, LayerSpec, Weights
from ..export.folder import check_files
from ..export.writer import write_model
from ..quantize.quantize import Packing
from ..session import Session
from ..train.processes import main_process_first
from .data import calibration_batches
from .models import load_packed


def quantize_stage(session: Session) -> Any:
    """The packed model: from base/ when it was made from this checkpoint with these settings, else packed now
    and kept.
    """
    run_dir = session.run
    key, folder = base_key(session), run_dir / "base"
    # A base that is about to be cut waits on the CPU, so that no device has to hold it whole.
    place = "cpu" if session.splits_base else None
    with run_dir.stage("quantize", session.device, resumable=True), main_process_first():
        stored = run_dir.read_json("base.json", {})
        if stored.get("key") == key and folder.is_dir():
            try:
                check_files(folder)
                session.say(f"base: reusing {folder}")
                return load_packed(folder, session, place)
            except ValueError as error:
                session.say(f"base: {error}\nbase: packing it again")
                shutil.rmtree(folder)
        pack_base(session, folder)
        model = load_packed(folder, session, place)
        run_dir.write_json("base.json", {"key": key, "digest": base_digest(model)})
    return model


def pack_base(session: Session, folder: Path) -> None:
    """base/, written layer by layer as it is packed: neither the checkpoint nor the packed model is ever
    whole in memory.
    """
    recipe, run_dir = session.recipe, session.run
    run_dir.write_json("base.json", {})  # a folder that is being replaced belongs to no key
    packing = Packing(
        session.checkpoint,
        recipe.quant,
        device=session.device,
        dtype=session.dtype,
        attention=recipe.model.attention,
        calibration=lambda: calibration_batches(session),
    )
    weights = Weights({name: LayerSpec(*spec) for name, spec in packing.specs.items()}, packing.take)
    write_model(folder, session.checkpoint, weights, EXPORTERS["native"])
    session.say(packing.table)
    run_dir.write_json("quant.json", packing.table.to_json())


def base_key(session: Session) -> str:
    """What the base is made of: the checkpoint's files, the quant section, and the text that its
    calibrator looks at.
    """
    recipe, reads_text = session.recipe, session.recipe.quant.reads_text
    facts = {
        "quant": recipe.quant.model_dump(mode="json"),
        "files": session.checkpoint.revision or session.checkpoint.fingerprint(),
        "text": [recipe.data.train.model_dump(mode="json"), recipe.train.seed] if reads_text else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
