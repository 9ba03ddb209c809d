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
from typing import Any

import torch

from ..data.synthesis import SynthesisConfig, Voice
from ..data.synthesis.folder import RowsFolder, fill, read_state, refuse_changed
from ..export import EXPORTERS
from ..files.atomic import visible_names
from ..files.records import Synthesis
from ..model.config import head_width
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
    max_len = config.max_len or session.recipe.data.sequence_len
    stops = EXPORTERS["native"].stops(session.checkpoint.folder)
    voice = Voice(session.tokenizer, stops, max_len, session.rows)
    rows = config.rows(voice)
    folder = RowsFolder(session.run / FOLDER, synthesis_key(session, config))
    todo = folder.missing(-(-rows.count // config.batch_size))
    if todo or not folder.state.done:
        by = folder.by(lambda: config.by if config.by != "auto" else _fitting(session, config, max_len))
        for note in rows.notes:
            session.say(f"synthesis: {note}")
        left = sum(min(config.batch_size, rows.count - shard * config.batch_size) for shard in todo)
        session.say(
            f"synthesis: {config.kind}, {left:,} of {rows.count:,} rows of at most {max_len:,} tokens, "
            f"{config.batch_size} at once, by the {by} model"
        )
        model = writer(session, by)
        with Told(session, left, max_len) as told:
            fill(folder, config, rows, voice, model, told)
        del model
        gc.collect()
        release_freed()
        session.say(f"synthesis: {folder.state}")
    else:
        session.say(f"synthesis: reusing {session.run / FOLDER}: {folder.state}")
    if config.valid and not folder.state.count("valid"):
        session.say(
            f"synthesis: no row for validation is left of {config.valid}: there is none, as without valid"
        )
    if not folder.state.count("train"):
        raise ValueError(
            f"data.synthesis: no row is left to train on ({folder.state}); look at "
            f"{session.run / FOLDER}/dropped, loosen data.synthesis.filter, or change "
            "the temperature: lower against text that is none, higher against repetition"
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


def _fitting(session: Session, config: SynthesisConfig, max_len: int) -> str:
    """dense where it fits what is free now; else packed."""
    model = session.checkpoint.empty_model()
    weights = sum(p.numel() for p in model.parameters()) * session.dtype.itemsize
    cuda = session.device.type == "cuda"
    free = torch.cuda.mem_get_info(session.device)[0] if cuda else free_ram()
    needed = writing_bytes(weights, model.config.get_text_config(), session.dtype.itemsize, config, max_len)
    if needed < free:
        return "dense"
    session.say(
        f"synthesis: the dense model needs {needed / 1e9:.1f} GB with its keys and values, "
        f"{free / 1e9:.1f} GB are free: packed to 8 bits"
    )
    return "packed"


def writing_bytes(weights: int, model: Any, size: int, config: SynthesisConfig, max_len: int) -> int:
    """Memory of writing with weights of so many bytes: the keys and values of a batch at its end, twice for a
    layer at a time (they grow by copies, which the allocator keeps), and the distribution of a step in fp32
    and 64 bits. model: its text configuration; size: bytes of a number of it."""
    cache = cache_bytes(model, size) * config.batch_size * max_len
    step = config.batch_size * getattr(model, "vocab_size", 0) * (size + 2 * 4 + 3 * 8)
    return round(1.15 * weights) + 2 * cache + step


def cache_bytes(config: Any, size: int) -> int:
    """Bytes of the keys and values of one token, of `size` bytes each; too many where a model keeps less
    (windows, latent keys)."""

    def number(*names: str) -> int:
        return next((v for v in (getattr(config, name, None) for name in names) if isinstance(v, int)), 0)

    heads = number("num_attention_heads", "n_head") or 1
    width = head_width(lambda key: getattr(config, key, None)) or number("hidden_size")
    return (
        2 * number("num_hidden_layers", "n_layer") * (number("num_key_value_heads") or heads) * width * size
    )


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
    folder = session.run / FOLDER
    entries = [shard.files for shard in written_rows(session).shards.values()]
    files = {name: entry for files in entries for name, entry in files.items()}
    written = {n: e for n, e in files.items() if n.startswith(f"{part}/")}
    refuse_changed(folder, written, whole=True)
    for name in visible_names(folder / part):
        if f"{part}/{name}" not in written:
            raise ValueError(
                f"{folder / part / name}: no row there is the model's, and it would be trained on; move it "
                "away, or give rows of your own as data.train"
            )
    return DataSource(path=str(folder / part), format="tokens")


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
        "max_len": config.max_len or recipe.data.sequence_len,
        "files": checkpoint.revision or checkpoint.fingerprint(),
        "quant": recipe.quant.model_dump(mode="json", include={"targets", "exclude"}),
        "dtype": recipe.model.dtype,
        "attention": recipe.model.attention,
    }
    if config.needs_template and recipe.data.chat:
        facts["chat"] = recipe.data.chat
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Told:
    """Progress: in a terminal one line that changes, in a log a line now and then."""

    def __init__(self, session: Session, rows: int, max_len: int):
        self.session, self.total, self.longest = session, rows, rows * max_len
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
            f"tokens/s, about {left:,.0f} s left"
        )
