"""reference: cached. The packed base without adapters is asked once, about the run's own pairs, and what it
says is kept in reference/ of the run.

A shard of the store is PER_SHARD windows, in micro-batches of the training's size: a killed asking goes on
with the next shard, and ends with the same bytes. Only windows that the run will see are asked about, and
those of validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..adapters.attach import base_digest
from ..data.batches import Batches
from ..data.windows import Examples
from ..model.attention import segment_attention, segment_inputs
from ..model.upload import upload
from ..session import Session
from ..signals.base import TAUGHT, Ask
from ..signals.reference import StepReference, first_tokens
from ..signals.sequences import SequenceStore
from ..signals.shards import OtherKey
from ..signals.tokens import sequence_numbers
from ..train.log import WalkLog
from ..train.losses import chunked_head
from ..train.processes import main_process_first, world
from ..train.setup import total_steps
from .data import batches, valid_examples
from .quantize import clear

FOLDER = "reference"
PER_SHARD = 256  # windows


def kept_reference(
    session: Session, model: Any, examples: Examples
) -> tuple[SequenceStore, SequenceStore | None]:
    """What the base says about the training windows of this run and about those of validation: read where it
    is there, asked where it is not, and checked by every process. model: packed, adapters attached.

    ValueError for files that are not whole.
    """
    train = session.recipe.train
    seen = Batches(examples, train.micro_batch_size, session.pad_id, train.seed, world=world())
    size = train.micro_batch_size * train.gradient_accumulation_steps * world()
    numbers, valid = seen.first(total_steps(train, seen) * size), valid_examples(session)
    with session.run.stage("reference", session.device, resumable=True), main_process_first():
        kept = _kept(session, model, examples, numbers, "train")
        if valid is None:
            return kept, None
        return kept, _kept(session, model, valid, list(range(len(valid))), "valid")


def _kept(session: Session, model: Any, examples: Examples, numbers: list[int], which: str) -> SequenceStore:
    folder = session.run / FOLDER / which
    which_windows = hashlib.sha256(json.dumps([examples.digest, numbers]).encode()).hexdigest()
    key = {
        "base": base_digest(model),
        "dtype": session.recipe.model.dtype,
        "mixed precision": session.recipe.train.mixed_precision,
        "windows": which_windows,
    }
    store = _opened(session, folder, key, numbers)
    if not store.missing():
        session.say(f"reference: reusing {folder}")
        return store
    assert session.run.main, "the main process has just filled it"
    done = len(numbers) - sum(len(store.windows(shard)) for shard in store.missing())
    with WalkLog("reference", len(numbers), done, session.run.main, session.console) as log:
        for shard in store.missing():
            windows = Examples(examples[number] for number in store.windows(shard))
            store.write(shard, *_asked(session, model, windows))
            session.check_files()
            done += len(windows)
            log.show(done)
    return SequenceStore(folder, key, numbers, PER_SHARD)  # as it is on the disk now


def _opened(session: Session, folder: Path, key: dict[str, Any], numbers: list[int]) -> SequenceStore:
    """The store in `folder`; one of another recipe makes room, as a base does."""
    try:
        return SequenceStore(folder, key, numbers, PER_SHARD)
    except OtherKey:
        if not session.run.main:
            raise
        session.say(f"reference: {folder} is of another recipe; asking again")
        clear(session, folder)
        return SequenceStore(folder, key, numbers, PER_SHARD)


def _asked(session: Session, model: Any, windows: Examples) -> tuple[list[int], torch.Tensor]:
    """(answers of each window, the log-probabilities of all of them fp64)."""
    size, device = session.recipe.train.micro_batch_size, session.device
    taught = batches(session, model, windows, size, shuffle=False, alone=True, taught=True)
    reference = StepReference(model)
    rows: list[int] = []
    found = [torch.zeros(0, dtype=torch.float64)]
    with segment_attention(model), reference.begin(chunked_head(model)), _autocast(session):
        for batch in taught.one_epoch():
            inputs = {k: v for k, v in batch.items() if k not in ("labels", *TAUGHT)}
            inputs |= segment_inputs(model, batch["position_ids"])
            on_device = {k: upload(v, device) if torch.is_tensor(v) else v for k, v in inputs.items()}
            said = reference.say(Ask(batch, on_device, device)).double().cpu()
            first = first_tokens(batch)
            number = sequence_numbers(batch["position_ids"]).reshape(-1)
            found += [said[part].sum()[None] for part in _answers(said, number)]
            per_row = first // batch["labels"].shape[1]
            rows += torch.bincount(per_row, minlength=len(batch["labels"])).tolist()
    return rows, torch.cat(found)


def _answers(said: torch.Tensor, number: torch.Tensor) -> Iterator[torch.Tensor]:
    """The places of each sequence of a batch, in order."""
    sizes = torch.bincount(number).tolist()
    yield from torch.arange(len(said)).split(sizes)


def _autocast(session: Session) -> AbstractContextManager[Any]:
    """As the training forward runs."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(session.recipe.train.mixed_precision)
    return nullcontext() if kind is None else torch.autocast(session.device.type, kind)
