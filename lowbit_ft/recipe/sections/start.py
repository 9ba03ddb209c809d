"""train.start_from: whether there is a run to start from, and nothing else that makes the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..yaml import Problem
from .base import Problems


def check_start(r: Any) -> Problems:
    """The folder of the other run, and what else would be the start of this one."""
    given, here = r.train.start_from, ("train", "start_from")
    if given is None:
        return
    run = Path(given).expanduser()
    if not (run / "adapter" / "adapter_config.json").is_file():
        yield Problem(
            here,
            f"got {given!r}, which has no adapter/ of a run that has trained; give the output folder of one "
            "(lowbit-ft run or train), or null",
        )
    elif run.resolve() == Path(r.output).expanduser().resolve():
        yield Problem(here, f"got {given!r}, the output of this recipe; give this run an output of its own")
    if (new := r.model.add_tokens) is not None and new.levels:
        yield Problem(
            ("model", "add_tokens", "audio", "rows"),
            "got factorised beside train.start_from: a run hands over rows, and not the vectors that they "
            "were made of; set rows: each, or start_from: null",
        )
    if r.train.reconstruct is not None:
        yield Problem(
            ("train", "reconstruct"),
            "got a fit beside start_from, whose tensors are fitted already; remove one of the two",
        )
    if getattr(r.adapter, "init_from", None) is not None:
        yield Problem(
            ("adapter", "init_from"),
            f"got {r.adapter.init_from!r} beside train.start_from; A and B have one start: remove one",
        )
    if getattr(r.quant.sparsity, "schedule", None) is not None:
        yield Problem(
            ("quant", "sparsity", "schedule"),
            "got one beside train.start_from: zeros would be chosen anew in weights that were chosen before; "
            "set quant.sparsity: {kind: locked} on the other run's export, or start_from: null",
        )
