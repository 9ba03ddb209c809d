"""train.start_from: the student of another run as the start of this one, which has an optimizer of its own.

What is handed over is all that trained there, unrounded, from its adapter/: on the same packed base, by the
same method. (merged/ has the codes alone: what lies between two of them would be lost.) So a run in which a
teacher intervened (train.signal.intervention) hands over to one without, as Teacher Intervention has its two.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapters.attach import load_adapter_state
from ..files.manifest import file_entry
from ..integrations.adapter_files import NOT_OPTIONS, TENSOR_FILE, read_adapter, refuse_other_base
from ..names import listed
from ..rundir import RunDir
from ..session import Session

STARTS = ("init", "dropout", *NOT_OPTIONS)  # of a method, what makes no other numbers of the same tensors


def refuse_other_words(session: Session) -> None:
    """Before anything is packed: ValueError where the other run trained rows of other tokens, or a head of
    other labels. Their tensors have the same shapes, and do not say whose they are."""
    given = session.recipe.train.start_from
    if given is None:
        return
    run = RunDir(Path(given).expanduser(), main=False)
    if not (run / "recipe.yaml").is_file():
        raise ValueError(
            f"train.start_from: {run.path} has no recipe.yaml, so whose tokens and labels it trained is not "
            "known; give the whole output folder of a run"
        )
    ours, theirs = session.recipe, run.recipe()
    for key, here, there in (
        (
            "model.add_tokens",
            *(one.model.add_tokens and one.model.add_tokens.every for one in (ours, theirs)),
        ),
        ("task.labels", *(getattr(one.task, "labels", None) for one in (ours, theirs))),
    ):
        if list(here or ()) != list(there or ()):
            raise ValueError(
                f"{key}: {_named(there)} in {run.path} (train.start_from), {_named(here)} here: what was "
                "trained for one would be taken for another; give both runs the same, in the same order"
            )


def _named(names: Sequence[str] | None) -> str:
    more = f" and {len(names) - 4:,} more" if names and len(names) > 4 else ""
    return f"{listed(names[:4])}{more}" if names else "none"


def start_from_run(session: Session, model: Any, digest: str) -> str | None:
    """Give the adapters of `model`, attached to the base of this digest, and what trains beside them, the
    tensors of the other run; sha256 of these, None without one. ValueError where they do not fit."""
    section = session.recipe.train
    if section.start_from is None:
        return None
    folder = Path(section.start_from).expanduser() / "adapter"
    config, state, theirs = read_adapter(folder)
    refuse_other_base(digest, theirs, str(folder))
    left, ours = (c.model_dump(mode="json", exclude=set(STARTS)) for c in (config, session.recipe.adapter))
    if other := sorted(key for key in left.keys() | ours.keys() if left.get(key) != ours.get(key)):
        told = "; ".join(f"{key} {left.get(key)!r} there, {ours.get(key)!r} here" for key in other)
        raise ValueError(
            f"train.start_from: {folder} was trained by another adapter ({told}): its tensors would mean "
            "something else; give both runs the same adapter section"
        )
    try:
        load_adapter_state(model, state)
    except ValueError as error:
        raise ValueError(f"train.start_from: {folder}: {error}") from None
    session.say(f"train: starts from the student of {section.start_from}")
    return file_entry(folder / TENSOR_FILE)["sha256"]
