"""The model of each stage, read back from the folder that the stage left, on a device that holds it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapters import AdapterConfig
from ..adapters.attach import attach, base_digest, load_adapter_state, train_head
from ..adapters.base import LowRankOptions
from ..export import EXPORTERS
from ..export.folder import check_files, read_manifest
from ..export.reader import load_exported
from ..integrations.adapter_files import check_adapter, read_adapter, refuse_other_base
from ..kv_cache import KVConfig, place_kv_cache
from ..model.checkpoint import Checkpoint
from ..model.config import read_config
from ..model.grown import GrownCheckpoint
from ..model.load import load_model
from ..model.purpose import head_parameters
from ..quantize.quantize import quantize
from ..quantize.table import packs_linears
from ..recipe.sections.quant import QuantSection
from ..segments import segments_in
from ..session import Session


def stage_model(session: Session, stage: str) -> Any:
    """The model of one stage, in the session's dtype. ValueError when the run has not come that far."""
    run_dir = session.run
    if stage == "base":
        device = dense_device(session, "the full-precision model")
        return load_model(session.checkpoint, session.recipe.model.attention, device, session.dtype).eval()
    if stage == "trained":
        return trained_model(session)
    folder = run_dir / ("base" if stage == "quantized" else stage)
    if not folder.is_dir():
        raise ValueError(f"{run_dir.path} has no {folder.name}/ yet, so there is no {stage} model to measure")
    run_dir.refuse_other(folder.name)
    if stage == "quantized":
        return load_packed(folder, session)
    model = load_exported(
        folder,
        dtype=session.dtype,
        device=reader_device(folder, session),
        attention=session.recipe.model.attention,
    )
    exporter = EXPORTERS[read_manifest(folder)["format"]]
    if exporter.measurable and not exporter.carries_kv_cache:
        place_kv_cache(model, kv_cache_of(run_dir / "merged"))  # as the server's flag would
    return model


def kv_cache_of(folder: Path) -> KVConfig | None:
    """What keys and values are on in a native folder."""
    entry = read_config(folder)["quantization_config"].get("kv_cache")
    return None if entry is None else KVConfig.from_json(entry)


def in_8_bits(session: Session, checkpoint: Checkpoint, group_size: int, **layers: Any) -> Any:
    """A full-precision model that computes beside the student or before it: its linears packed to 8 bits by
    their absmax, on the session's device, without calibration text or residual; never written, because made
    again it is the same bit for bit. Convolutions are packed where there is nothing else. layers:
    quant.targets and quant.exclude."""
    quant = QuantSection.model_validate(
        {"bits": 8, "group_size": group_size, "residual_bits": 0, "calibrate": "absmax", **layers}
    )
    if not packs_linears(checkpoint.empty_model(session.recipe.model.attention), quant):
        quant = quant.model_copy(update={"convolutions": True})
    return quantized(session, checkpoint, quant)


def quantized(session: Session, checkpoint: Checkpoint, quant: QuantSection) -> Any:
    """A checkpoint packed in memory, for this session to compute with."""
    attention = session.recipe.model.attention
    return quantize(checkpoint, quant, device=session.device, dtype=session.dtype, attention=attention)[0]


FOLDERS = ("base", "adapter", "merged", "exported")


def check_folders(session: Session, names: Sequence[str] = FOLDERS) -> None:
    """That what is there of these folders is whole and this run's, before any of it is loaded. ValueError
    naming what is not.
    """
    for name in names:
        if (session.run / name).is_dir():
            session.run.refuse_other(name)
            check_adapter(session.run / name) if name == "adapter" else check_files(session.run / name)


def adapter_of(session: Session) -> AdapterConfig:
    """The recipe's adapter, with the rows of new tokens, and the parts of the model's fused matrices where it
    asks for them."""
    config = session.recipe.adapter
    if isinstance(checkpoint := session.checkpoint, GrownCheckpoint):
        new = checkpoint.new
        config = config.with_token_rows(dict.fromkeys(checkpoint.tables, new.ids), new.levels)
    if not isinstance(config, LowRankOptions) or config.segments == "none":
        return config
    found = segments_in(session.checkpoint.folder)
    return config.with_plan({name: segments.outputs for name, segments in found.items()})


def trained_model(session: Session) -> Any:
    """base/ with adapter/ on it. ValueError when the run has not trained, or the adapter belongs to another
    base.
    """
    run_dir = session.run
    if not (run_dir / "adapter").is_dir():
        raise ValueError(f"{run_dir.path} has no adapter yet; run `lowbit-ft train` on its recipe first")
    for name in ("base", "adapter"):
        run_dir.refuse_other(name)
    model = load_packed(run_dir / "base", session)
    config, state, digest = read_adapter(run_dir / "adapter")
    refuse_other_base(base_digest(model), digest, str(run_dir / "adapter"))
    # The start does not matter, every tensor is about to be replaced.
    start = {"init": "zero"} if "init" in type(config).model_fields else {}
    beside = {"modules_to_save": session.recipe.adapter.modules_to_save}  # without the head of the task
    attach(model, config.model_copy(update={**start, **beside}))
    if session.recipe.task.trains_head:
        train_head(model, head_parameters(model, session.recipe.train.signal.learns_labels))
    load_adapter_state(model, state)
    return model.eval()


def load_packed(folder: Path, session: Session, device: str | None = None) -> Any:
    """A native folder: packed, on the session's device (or `device`) and in its dtype."""
    return load_exported(
        folder,
        dtype=session.dtype,
        device=device or str(session.device),
        attention=session.recipe.model.attention,
    )


def reader_device(folder: Path, session: Session) -> str:
    """Where to read an exported folder: formats whose transformers reader makes the model dense may not fit
    the GPU.
    """
    if (
        session.device.type != "cuda"
        or read_config(folder)["quantization_config"]["quant_method"] == "lowbit_ft"
    ):
        return str(session.device)
    return dense_device(session, str(folder))


def dense_device(session: Session, what: str) -> str:
    """Where a dense model fits: the session's device, else the CPU."""
    if session.device.type != "cuda":
        return str(session.device)
    dense = (
        sum(p.numel() for p in session.checkpoint.empty_model(session.recipe.model.attention).parameters())
        * session.dtype.itemsize
    )
    free = torch.cuda.mem_get_info(session.device)[0]
    if dense * 1.15 < free:
        return str(session.device)
    session.say(
        f"{what} is dense in its reader ({dense / 1e9:.1f} GB, {free / 1e9:.1f} GB free on the GPU): read "
        "on the CPU, slowly"
    )
    return "cpu"
