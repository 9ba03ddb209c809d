"""merge: base/ and adapter/ become merged/, and a merge made again is compared with it."""

import warnings
from pathlib import Path
from typing import Any

import torch

from .. import merge as merging
from ..adapters.attach import adapted_layers
from ..adapters.whole import whole_state
from ..export.folder import check_files
from ..files.records import Environment
from ..session import Session
from .card import card
from .rotations import rotation_file


def merge_stage(session: Session, model: Any) -> None:
    """merged/: the codes and scales of the last forward, on the device that trained them; and what training
    moved.
    """
    with session.run.stage("merge", session.device):
        with warnings.catch_warnings():
            # said below, with its size
            warnings.filterwarnings("ignore", message="lora: the merge rounds again")
            merging.merge(
                model,
                session.folded.replaced(whole_state(model)),
                session.run / "merged",
                extra_files=card(session, "native") | rotation_file(session),
                before_it_counts=session.check_files,
            )
            session.run.made("merged")
            session.run.write_json("moved.json", merging.moved(model))
        losses = [getattr(layer.adapter, "rounding_loss", None) for _, layer in adapted_layers(model)]
        if told := [loss for loss in losses if loss is not None]:
            mean = sum(told) / len(told)
            session.say(
                f"{session.recipe.adapter.method} was merged by rounding again: the rounding error is "
                f"{mean:.1f} times the size of what was trained"
            )


def compare_merge(session: Session, model: Any, folder: Path) -> None:
    """Merge again without writing, and say how merged/ compares. ValueError when it differs from what
    training wrote on this kind of device; on another kind the codes that differ are counted.
    """
    session.run.refuse_other(folder.name)
    check_files(folder)
    report = merging.verify_merge(model, folder)
    trained_on = session.run.read_json("environment.json", Environment, Environment()).device or str(
        session.device
    )
    if not report.exact and torch.device(trained_on).type == session.device.type:
        raise ValueError(f"{folder} is not what base/ and adapter/ merge to:\n{report}")
    session.say(report)
