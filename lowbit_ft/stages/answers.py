"""teacher: cached. The full-precision model is asked once, about the run's own windows, and its words are
kept.

The model is walked one dense layer at a time (evaluate.Reference), so nothing of it is whole in memory. The
windows go through it some at a time, a walk for each shard of the store: so many that what waits for them in
CPU memory stays below WALK_BYTES and a shard below SHARD_BYTES. Which windows go together depends on the
recipe alone, not on where an earlier try was killed: what is written is the same bytes either way.

Only windows that the run will see are asked about, in a short run fewer than there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batches
from ..data.windows import Examples
from ..evaluate.perplexity import Reference
from ..files.lock import FolderLock
from ..model.attention import why_not
from ..quantize.memory import WALK_BYTES, waiting_bytes
from ..recipe.layers import Shapes, read_shapes
from ..recipe.recipe import Recipe
from ..session import Session
from ..signals.base import TAUGHT
from ..signals.cached import TOP_K, looked_at
from ..signals.shards import OtherKey
from ..signals.store import Store, bytes_per_position, condense
from ..signals.tokens import FLOATS_AT_A_TIME
from ..train.log import WalkLog
from ..train.losses import Targets
from ..train.processes import main_process_first, world
from ..train.setup import total_steps
from .data import batches
from .quantize import clear

SHARD_BYTES = 256 << 20  # of a file
LAYERS_SHARE = 0.9  # of a walk's time, for the bar: then come the head and the choice of the k


def kept_answers(session: Session, model: Any, examples: Examples) -> Store:
    """What the full-precision model says about the windows of this run: read where it is there, asked where
    it is not, and checked by every process. model: the packed one, which is asked how its kind attends.

    ValueError for a folder of other answers that is not this run's own, and for files that are not whole.
    """
    recipe, run_dir = session.recipe, session.run
    given = recipe.train.teacher_dir
    shared, folder = given is not None, run_dir / "teacher" if given is None else Path(given).expanduser()
    key, numbers, together = _asked(session, examples)
    with run_dir.stage("teacher", session.device, resumable=True), main_process_first():
        store = _opened(session, folder, key, numbers, together, own=not shared)
        if store.missing():
            assert run_dir.main, "the main process has just filled it"
            folder.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(folder) if shared else None  # the run's own folder is held already
            try:
                ask(session, model, examples, Store(folder, key, numbers, together))
            finally:
                if lock is not None:
                    lock.release()
            store = Store(folder, key, numbers, together)  # as it is on the disk now
        else:
            session.say(f"teacher: reusing {folder}")
    return store


def refuse_other_answers(session: Session, examples: Examples) -> None:
    """ValueError where train.teacher_dir holds answers to other questions, or files that are not whole; now,
    and not behind what quantizing takes."""
    given = session.recipe.train.teacher_dir
    if given is not None:
        Store(Path(given).expanduser(), *_asked(session, examples))


def _asked(session: Session, examples: Examples) -> tuple[dict[str, Any], list[int], int]:
    """(what the answers depend on, the windows that the run will see, how many go through the model at a
    time)"""
    recipe, train, signal = session.recipe, session.recipe.train, session.recipe.train.signal
    seen = Batches(examples, train.micro_batch_size, session.pad_id, train.seed, world=world())
    size = train.micro_batch_size * train.gradient_accumulation_steps * world()
    numbers = seen.first(total_steps(train, seen) * size)
    vocabulary = session.checkpoint.config.get_text_config().vocab_size
    k = signal.top_k or min(TOP_K, vocabulary)
    if k > vocabulary:
        raise ValueError(f"train.signal.top_k: got {k}; this model has {vocabulary} tokens, so at most that")
    together = windows_per_walk(
        recipe, read_shapes(session.checkpoint.folder), bytes_per_position(k, vocabulary)
    )
    which = hashlib.sha256(json.dumps([examples.digest, numbers]).encode()).hexdigest()
    key = {
        "model": session.checkpoint.revision or session.checkpoint.fingerprint(),
        "dtype": recipe.model.dtype,
        "windows": which,
        "on": signal.on,
        "top_k": k,
        "temperature": signal.temperature,
        "vocabulary": vocabulary,
    }
    return key, numbers, together


def _opened(
    session: Session, folder: Path, key: dict[str, Any], numbers: list[int], together: int, *, own: bool
) -> Store:
    """The store in `folder`. In the run's own folder one of another recipe makes room, as a base does."""
    try:
        return Store(folder, key, numbers, together)
    except OtherKey:
        if not own or not session.run.main:
            raise
        session.say(f"teacher: {folder} is of another recipe; asking again")
        clear(session, folder)
        return Store(folder, key, numbers, together)


def windows_per_walk(recipe: Recipe, shapes: Shapes, row_bytes: int) -> int:
    """How many windows go through the model together. row_bytes: of a position on the disk."""
    length = recipe.data.sequence_len
    held = waiting_bytes(1, length, shapes, getattr(torch, recipe.model.dtype).itemsize)
    most = min(WALK_BYTES // held, SHARD_BYTES // (length * row_bytes))
    size = windows_per_forward(recipe)
    return max(1, most // size) * size


def windows_per_forward(recipe: Recipe) -> int:
    """As many as evaluation has: about 4096 tokens."""
    return max(1, 4096 // recipe.data.sequence_len)


def ask(session: Session, model: Any, examples: Examples, store: Store) -> None:
    """Write the shards of `store` that are missing: the full-precision model's words about `examples`. model:
    the packed one, which is asked how its kind attends."""
    missing = store.missing()
    done = len(store.numbers) - sum(len(store.windows(shard)) for shard in missing)
    with WalkLog("teacher", len(store.numbers), done, session.run.main, session.console) as log:
        for shard in missing:
            windows = Examples(examples[number] for number in store.windows(shard))
            said = partial(_said, log, done, LAYERS_SHARE * len(windows))
            store.write(shard, *_walked(session, model, windows, store, said))
            session.check_files()
            done += len(windows)
            log.show(done)


def _said(log: WalkLog, before: int, windows: float, share: float) -> None:
    log.show(before + share * windows)


def _walked(
    session: Session, model: Any, windows: Examples, store: Store, said: Callable[[float], None]
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """(positions of each window, and `condense` of all of them) by one walk through the model's layers."""
    size = windows_per_forward(session.recipe)
    taught = batches(session, model, windows, size, shuffle=False, alone=True, taught=True)
    found = list(taught.one_epoch())
    reference = Reference(
        session.checkpoint,
        [{name: value for name, value in batch.items() if name not in TAUGHT} for batch in found],
        attention=session.recipe.model.attention,
        device=session.device,
        dtype=session.dtype,
        segments=not why_not(model),
        on_layer=said,
    )
    rows: list[int] = []
    kept = [condense(torch.empty(0, store.vocabulary), store.k)]
    for number, batch in enumerate(found):
        looked = looked_at(batch, store.key["on"])
        rows += looked.sum(1).tolist()
        if not bool(looked.any()):
            continue  # Targets would make up a position
        targets = Targets(batch["labels"], session.device, looked)
        for logits, _ in reference.target_logits(number, targets):
            if logits.shape[-1] != store.vocabulary:
                raise ValueError(
                    f"train.teacher: got 'cached', but this model makes {logits.shape[-1]} logits and its "
                    f"config.json says vocab_size {store.vocabulary}; correct it, or set another teacher"
                )
            for some in logits.split(max(1, FLOATS_AT_A_TIME // store.vocabulary)):
                answers = condense(some, store.k, float(store.key["temperature"]))
                kept.append(tuple(t.cpu() for t in answers))  # pyright: ignore[reportArgumentType]
    ids, log_p, rest = (torch.cat(column) for column in zip(*kept, strict=True))
    return rows, ids, log_p, rest
