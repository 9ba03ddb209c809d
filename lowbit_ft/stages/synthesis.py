"""synthesis: rows that the full-precision model writes itself, in synthesis/, before anything looks at rows.

Before quantize: gptq and its like look at these rows too. The base is not packed yet then, and base and
residual are the model only where calibration moved nothing, so the model that writes is the checkpoint
itself: dense where that fits beside its keys and values, else a copy packed to 8 bits on the way (absmax,
groups of 128), of whatever grid the run is; of a checkpoint that came quantized its own codes. Measured in
LOG.md.
"""

import gc
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.synthesis import SynthesisConfig
from ..data.synthesis.base import PARTS, Given, Maker
from ..data.synthesis.folder import RowsFolder, fill, read_state, refuse_changed
from ..export import EXPORTERS
from ..files.atomic import visible_names
from ..files.manifest import file_entry
from ..files.records import Synthesis
from ..model.config import CONFIG
from ..model.hub import SMALL_FILES
from ..model.load import load_model
from ..recipe.sections.data import DataSource
from ..session import Session
from ..train.memory import free_ram, release_freed
from ..train.processes import main_process_first
from .models import in_8_bits, quantized

FOLDER = "synthesis"
SAY_EVERY = 15.0  # seconds between two lines in a log


def synthesis_stage(session: Session) -> None:
    """synthesis/, written or gone on with where the recipe has data.synthesis. ValueError when no row is left
    to train on, or a file there was changed."""
    config = session.recipe.data.synthesis
    if config is None:
        return
    with session.run.stage("synthesis", session.device, resumable=True), main_process_first():
        if session.run.main:
            _write(session, config)


def _write(session: Session, config: SynthesisConfig) -> None:
    maker = config.maker(_given(session, config))  # may refuse, before rows of another recipe go
    folder = RowsFolder(session.run / FOLDER, synthesis_key(session, config))
    todo = folder.missing(-(-maker.count // config.batch_size))
    if todo or not folder.state.done:
        by = folder.by(lambda: config.writer if config.writer != "auto" else _fitting(session, config))
        for note in maker.notes:
            session.say(f"synthesis: {note}")
        left = sum(min(config.batch_size, maker.count - shard * config.batch_size) for shard in todo)
        session.say(
            f"synthesis: {config.kind}, {left:,} of {maker.count:,} rows of at most {maker.longest:,} "
            f"{maker.unit}, {config.batch_size} at once, by the {by} model"
        )
        model = writer(session, by)
        with Told(session, left, maker) as told:
            fill(folder, maker, config.batch_size, model, told)
        del model
        gc.collect()
        release_freed()
        session.say(f"synthesis: {folder.state}")
    else:
        session.say(f"synthesis: reusing {session.run / FOLDER}: {folder.state}")
    for warning in folder.state.warnings:
        session.say(f"warning: synthesis: {warning}")
    if config.valid and not folder.state.count("valid"):
        session.say(
            f"synthesis: no row for validation is left of {config.valid}: there is none, as without valid"
        )
    if not folder.state.count("train"):
        raise ValueError(
            f"data.synthesis: no row is left to train on ({folder.state}); look at "
            f"{session.run / FOLDER}/dropped, {config.loosen}"
        )


def _given(session: Session, config: SynthesisConfig) -> Given:
    return Given(
        session.tokenizer,
        EXPORTERS["native"].stops(session.checkpoint.folder),
        session.rows,
        config.longest(session.recipe.data.sequence_len),
        session.recipe.task.labeller(session.tokenizer),
    )


def writer(session: Session, by: str) -> Any:
    """The model that writes: dense, or packed to 8 bits."""
    recipe = session.recipe
    if by == "dense":
        return load_model(session.checkpoint, recipe.model.attention, session.device, session.dtype).eval()
    quant = recipe.quant
    if quant.from_checkpoint:
        return quantized(session, session.checkpoint, quant)
    return in_8_bits(session, session.checkpoint, 128, targets=quant.targets, exclude=quant.exclude)


def _fitting(session: Session, config: SynthesisConfig) -> str:
    """dense where it fits what is free now; else packed."""
    model = session.checkpoint.empty_model()
    weights = sum(p.numel() for p in model.parameters()) * session.dtype.itemsize
    cuda = session.device.type == "cuda"
    free = torch.cuda.mem_get_info(session.device)[0] if cuda else free_ram()
    longest = config.longest(session.recipe.data.sequence_len)
    needed = config.working_bytes(weights, model.config, session.dtype.itemsize, longest)
    if needed < free:
        return "dense"
    session.say(
        f"synthesis: the dense model needs {needed / 1e9:.1f} GB with its keys and values, "
        f"{free / 1e9:.1f} GB are free: packed to 8 bits"
    )
    return "packed"


def train_source(session: Session) -> DataSource | Sequence[DataSource]:
    """The training rows: data.train (one source, or several), or what the model wrote. ValueError when that
    is missing or changed."""
    train = session.recipe.data.train
    if train is not None:
        return train
    if session.recipe.data.synthesis is None:
        raise ValueError(
            "data: got neither train nor synthesis; add `train: ...` (training rows) to the recipe"
        )
    return _written(session, "train")


def valid_source(session: Session) -> DataSource | Sequence[DataSource] | None:
    """The validation rows: data.valid, or those that the model wrote; None without any."""
    data = session.recipe.data
    if data.valid is not None or data.synthesis is None or not data.synthesis.valid:
        return data.valid
    return _written(session, "valid") if written_rows(session).count("valid") else None


def written_rows(session: Session) -> Synthesis:
    """The manifest of synthesis/. ValueError where it is not whole."""
    folder = session.run / FOLDER
    if not folder.is_dir() or not (state := read_state(folder)).done:
        raise ValueError(f"{folder}: not all rows are written; run the line again (lowbit-ft run)")
    return state


def _written(session: Session, part: str) -> DataSource:
    folder, config = session.run / FOLDER, session.recipe.data.synthesis
    assert config is not None
    entries = [shard.files for shard in written_rows(session).shards.values()]
    files = {name: entry for files in entries for name, entry in files.items()}
    named = {n: e for n, e in files.items() if n.partition("/")[0] not in PARTS}  # by rows of any part
    written = {n: e for n, e in files.items() if n.startswith(f"{part}/")} | named
    refuse_changed(folder, written, whole=True)
    for name in visible_names(folder / part):
        if f"{part}/{name}" not in written:
            raise ValueError(
                f"{folder / part / name}: no row there is the model's, and it would be trained on; move it "
                "away, or give rows of your own as data.train"
            )
    return DataSource(path=str(folder / part), format=config.format)


def rows_key(session: Session) -> Any:
    """What the training rows are, for the key of what is made of them."""
    data = session.recipe.data
    if isinstance(data.train, list):
        return [*(source.model_dump(mode="json") for source in data.train), data.stopping_strategy]
    return (data.train if data.train is not None else written_rows(session)).model_dump(mode="json")


def synthesis_key(session: Session, config: SynthesisConfig) -> str:
    """What the rows are made of."""
    recipe, checkpoint = session.recipe, session.checkpoint
    facts = {
        "config": config.model_dump(mode="json"),
        "max_len": config.longest(recipe.data.sequence_len),
        "files": checkpoint.revision or [*checkpoint.fingerprint(), *beside_weights(checkpoint.folder)],
        "quant": recipe.quant.model_dump(mode="json", include={"targets", "exclude"}),
        "dtype": recipe.model.dtype,
        "attention": recipe.model.attention,
    }
    if config.needs_template and recipe.data.chat:
        facts["chat"] = recipe.data.chat
    if config.reads == "images":  # whose labels and columns rows have
        facts["task"] = recipe.task.model_dump(mode="json")
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def beside_weights(folder: Path) -> list[list[str]]:
    """[name, sha256] of the small files of a model folder that rows depend on: the tokenizer or the image
    processor, the chat template, the tokens that end a text."""
    names = {path.name for pattern in SMALL_FILES for path in folder.glob(pattern) if path.is_file()}
    return [
        [name, file_entry(folder / name)["sha256"]]
        for name in sorted(names)
        if name != CONFIG and not name.endswith(".index.json")  # in the fingerprint; of no row
    ]


class Told:
    """Progress: in a terminal one line that changes, in a log a line now and then."""

    def __init__(self, session: Session, rows: int, maker: Maker):
        self.session, self.total, self.longest = session, rows, rows * maker.longest
        self.unit = maker.unit
        self.rows, self.tokens, self.began = 0, 0, time.monotonic()
        self.said, self.whole = self.began, 0  # tokens of the rows that are done
        self.live = session.console.status("synthesis") if session.console.is_terminal else None

    def __enter__(self) -> "Told":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, rows: int, tokens: int) -> None:
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens
        self.whole = self.tokens if rows else self.whole
        now = time.monotonic()
        if now - self.said < (0.5 if self.live is not None else SAY_EVERY):
            return
        self.said = now
        if self.live is not None:
            self.live.update(str(self))
        else:
            self.session.say(str(self))

    def __str__(self) -> str:
        spent = time.monotonic() - self.began
        # before the first row a bound
        share = self.rows / self.total if self.rows else self.tokens / self.longest
        left = spent / share - spent if share else float("inf")
        return (
            f"synthesis: row {self.rows:,} of {self.total:,}, {self.tokens / max(spent, 1e-9):,.0f} "
            f"{self.unit}/s, about {left:,.0f} s left"
        )
