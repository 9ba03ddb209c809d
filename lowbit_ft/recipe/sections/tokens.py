"""model.add_tokens against the tokenizer, the tables of the checkpoint, what is packed, and the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...files.tensorfile import CheckpointError
from ...model.checkpoint import Checkpoint
from ...model.grown import tables_of, token_problems
from ...model.tokenizer import read_tokenizer
from ...signals import SIGNALS
from ...speech.tokens import code_of_codec, token_code
from ..layers import local_folder
from ..yaml import Problem
from .base import Problems
from .modules import against_masters

HERE = ("model", "add_tokens")


def check_add_tokens(r: Any) -> Problems:
    """Tokens that cannot be added, and tables that cannot grow. (A model that is not on this disk is asked
    when it is fetched.)"""
    if (wanted := r.model.add_tokens) is None:
        return
    yield from _against_codec(wanted.audio)
    if (folder := local_folder(r.model.path, r.model.revision)) is not None:
        try:
            found = token_problems(read_tokenizer(folder), wanted.every, wanted.copied)
        except CheckpointError:
            found = []  # check_chat, or the start of the run, tells what is missing
        yield from (Problem((*HERE, "tokens"), problem) for problem in found)
        try:
            tables_of(Checkpoint.open(folder))
        except (OSError, ValueError) as error:
            yield Problem(HERE, f"got tokens that need a row each, but {error}; remove it")
    if hasattr(r, "quant"):
        for key in ("embeddings", "lm_head"):
            if (bits := getattr(r.quant, key)) is not None:
                yield Problem(
                    ("quant", key),
                    f"got {bits} with model.add_tokens: rows of a packed table are integers, and new ones "
                    f"could not train; set {key}: null",
                )
    if hasattr(r, "train"):
        yield from _against_loop(r.train)
    if hasattr(r, "data") and r.data.synthesis is not None:
        yield Problem(
            ("data", "synthesis"),
            "got rows that the model writes itself, with model.add_tokens: it does not write tokens that it "
            "has not learned; give data.train",
        )


def _against_codec(audio: Any) -> Problems:
    """A codec that is not there is no matter once the recipe says its code (as that of a run folder does)."""
    if audio is None or audio.codec is None:
        return
    try:
        found = code_of_codec(Path(audio.codec).expanduser())
    except ValueError as error:
        if audio.code is None:
            yield Problem((*HERE, "audio", "codec"), f"got {audio.codec!r}: {error}")
        return
    if audio.code is not None and token_code(audio.code) != found:
        yield Problem(
            (*HERE, "audio", "code"),
            f"got {token_code(audio.code)}, and {audio.codec} has {found}; leave code out, or give that one",
        )


def _against_loop(train: Any) -> Problems:
    if SIGNALS[train.signal.kind].asks:
        yield Problem(
            ("train", "signal", "kind"),
            f"got {train.signal.kind!r} with model.add_tokens: a teacher knows nothing of the new tokens, "
            "and would teach the model not to write them; set kind: labels",
        )
    yield from against_masters(train, ".".join(HERE), "row")
    if train.max_steps == 0:
        yield Problem(
            HERE,
            "got tokens, but train.max_steps 0 only fits adapters (train.reconstruct), so their rows would "
            "ship as they begin; train for some steps, or remove it",
        )
    if train.loss == "liger":
        yield Problem(
            ("train", "loss"),
            "got 'liger', which learns a whole head or none, with model.add_tokens; set loss: chunked",
        )
