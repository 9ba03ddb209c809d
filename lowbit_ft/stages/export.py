"""export: merged/ in the format of a server, read back and compared before it counts as a model."""

import sys
from pathlib import Path
from typing import Any

from ..export import EXPORTERS
from ..export.folder import check_target, read_manifest
from ..export.reader import read_trained, read_weights
from ..export.verify import verify
from ..export.writer import write_model
from ..files.atomic import free_name, remove_folder
from ..files.manifest import MANIFEST
from ..kv_cache import place_kv_cache
from ..model.shipped import as_shipped
from ..session import Session
from ..train.memory import release_freed
from .card import card
from .models import load_packed, reader_device


def refuse_export(session: Session, name: str) -> None:
    """ValueError when this run cannot be exported in that format: it is unknown, nothing is merged yet, or
    its reader, which verify needs, is not installed.
    """
    run_dir = session.run.path
    if name not in EXPORTERS:
        raise ValueError(f"format: got {name!r}; allowed are {', '.join(EXPORTERS)}")
    if EXPORTERS[name].needs_activations and session.recipe.quant.activations is None:
        raise ValueError(
            f"format: {name} is for models whose inputs are quantized too, and this run left them alone; use "
            "compressed-tensors"
        )
    if not (session.run / "merged").is_dir():
        raise ValueError(f"{run_dir} has no merged model yet; run `lowbit-ft train` on its recipe first")
    if session.recipe.export.verify and (reason := EXPORTERS[name].missing(EXPORTERS[name].reads_with)):
        raise ValueError(
            f"format: {name} is verified through its reader, which {reason}; or set export.verify: false "
            f"in {run_dir}/recipe.yaml"
        )


def export_stage(session: Session, name: str) -> Path:
    """exported/: the merged integers in the format of a server, reloaded through its reader and compared. The
    native format is merged/ itself."""
    folder = session.run / ("merged" if name == "native" else "exported")
    with session.run.stage("export", session.device):
        session.run.refuse_other("merged")
        if name != "native":
            before = read_manifest(folder)["format"] if (folder / MANIFEST).is_file() else name
            if before != name and session.run.main:
                print(
                    f"note: {folder}: the {before} export that is here will be replaced by {name}; a run has "
                    f"one, and `lowbit-ft export {session.run.path} --format {before}` writes it again",
                    file=sys.stderr,
                )
            merged = read_weights(session.run / "merged")
            checkpoint = as_shipped(session.folded, read_trained(session.run / "merged"))
            write_model(folder, checkpoint, merged, EXPORTERS[name], extra_files=card(session, name))
            session.run.made("exported")
        if session.recipe.export.verify:
            try:
                check_export(session, folder)
            except BaseException as error:
                if name == "native":  # merged/ is what was trained, not a copy of it
                    raise
                refused = set_aside(folder)
                if isinstance(error, ValueError):
                    raise ValueError(
                        f"{error}\n{folder} was not verified and is no model to serve; what was written is "
                        f"in {refused}"
                    ) from error
                raise
    return folder


def check_export(session: Session, folder: Path) -> None:
    """Compare a folder with merged/, through the format's own reader: files, codes, scales, weights,
    logits.
    """
    merged = session.run / "merged"
    device = reader_device(folder, session)

    def packed() -> Any:
        model = load_packed(merged, session)
        if not EXPORTERS[read_manifest(folder)["format"]].carries_kv_cache:
            place_kv_cache(model, None)  # nor has the model that is read from the folder
        return model

    session.say(
        verify(
            folder,
            read_weights(merged),
            model=packed,
            dtype=session.dtype,
            device=device,
            source=session.checkpoint.folder,
            dense=read_trained(merged),
            chat_template=session.checkpoint.chat_template,
            attention="eager" if session.recipe.model.attention == "eager" else None,
        )
    )
    release_freed()


def set_aside(folder: Path) -> Path:
    """Rename a folder that failed to <name>.refused, instead of one that failed before. Nothing takes it for
    a model of the run. What stands there and is not wholly ours stays: another name is taken.
    """
    refused = folder.with_name(f"{folder.name}.refused")
    if refused.exists():
        try:
            check_target(refused)
            remove_folder(refused)
        except ValueError:  # somebody else's, or changed since: it stays
            refused = free_name(refused)
    return folder.rename(refused)
