"""Session: what every stage of a run needs, and the small questions they share (which device, which batches,
is this the same base).

A session is opened on a recipe (`start`, which makes or continues the run folder) or on the folder of a run
that is there (`resume`, which changes nothing in it).
"""

import hashlib
import itertools
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .adapters.attach import adapted_layers
from .data.batches import Batches, keeps_segments_apart
from .data.chat import ChatTemplate
from .data.examples import StreamedExamples, load_examples
from .data.windows import Examples
from .export import EXPORTERS
from .export.reader import load_exported, read_config
from .model.attention import why_not
from .model.load import Checkpoint, load_tokenizer
from .model.walk import Batch
from .recipe.incoming import resolve_quant
from .recipe.layers import local_folder
from .recipe.recipe import DataSource, Recipe, RecipeError, check_recipe
from .rundir import RunDir, environment
from .train.processes import join, main_process_first, rank, world

LONG = 8192  # tokens of a window from which on a mask of length x length is worth a word (67 MB)


@dataclass
class Session:
    """The recipe, its run folder, the checkpoint and its tokenizer, and where to compute."""

    recipe: Recipe
    run: RunDir
    checkpoint: Checkpoint
    tokenizer: Any
    device: torch.device
    console: Console

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.recipe.model.dtype)

    @property
    def pad_id(self) -> int:
        """The tokenizer's padding token; pads are never targets, so the end-of-text token or 0 does as
        well.
        """
        return next(
            (i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0
        )

    def say(self, text: object) -> None:
        """Print on the main process."""
        if self.run.main:
            self.console.print(str(text), highlight=False, soft_wrap=True, markup=False)


def start(recipe: Recipe) -> Session:
    """Make the run folder (or continue in it) and open the checkpoint; no weight is read yet."""
    device = pick_device(recipe)
    main = join(device)
    # The low-rank product that makes codes is fp32; a process that trained with TF32 would merge other codes
    # without it.
    torch.set_float32_matmul_precision("highest")
    with main_process_first():
        stored = RunDir(recipe.output, main=False).read_json("environment.json", {})
        # A branch of a hub model moves on; a run stays with the commit it began with.
        revision = recipe.model.revision or stored.get("revision")
        if local_folder(recipe.model.path, revision) is None:
            Checkpoint.open(
                recipe.model.path, revision, recipe.model.dtype
            )  # fetched, before its grid is asked for
        recipe = _with_checkpoint_grid(recipe)
        run = RunDir.start(recipe) if main else RunDir(recipe.output, main=False)
        checkpoint = Checkpoint.open(recipe.model.path, revision, recipe.model.dtype)
        if checkpoint.revision is not None and (problems := check_recipe(recipe)):
            # A hub model has only now been fetched: its layers can be checked against grid and format.
            raise RecipeError([str(problem) for problem in problems])
        if not stored:
            facts = {"model": recipe.model.path, "revision": checkpoint.revision, "device": str(device)}
            run.write_json("environment.json", environment() | facts)
    session = Session(recipe, run, checkpoint, load_tokenizer(checkpoint), device, Console())
    session.say(
        f"{recipe.name}: {recipe.model.path} ({checkpoint.revision or 'local'}) on {device}, "
        f"{recipe.model.dtype}"
    )
    return session


def _with_checkpoint_grid(recipe: Recipe) -> Recipe:
    """The recipe with the quant section of a checkpoint that is quantized already; equal to it when
    load_recipe has seen to that.
    """
    quant, against = resolve_quant(recipe.model, recipe.quant)
    if against:
        raise RecipeError([str(problem) for problem in against])
    return recipe.model_copy(update={"quant": quant})


def resume(run_dir: Path) -> Session:
    """The session of a run that is there; nothing is written."""
    run = RunDir(run_dir)
    recipe = run.recipe().model_copy(update={"output": Path(run_dir)})
    revision = recipe.model.revision or run.read_json("environment.json", {}).get("revision")
    checkpoint = Checkpoint.open(recipe.model.path, revision, recipe.model.dtype)
    torch.set_float32_matmul_precision("highest")
    return Session(recipe, run, checkpoint, load_tokenizer(checkpoint), pick_device(recipe), Console())


def pick_device(recipe: Recipe) -> torch.device:
    """auto is the GPU when there is one; under torchrun each process takes its own."""
    wanted = recipe.model.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device: cuda, but torch sees no GPU here; set model.device: cpu (or auto)")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if wanted == "cuda" else "cpu")


def base_key(session: Session) -> str:
    """What the base is made of: the checkpoint's files, the quant section, and the text that gptq looks
    at.
    """
    recipe, reads_text = session.recipe, session.recipe.quant.calibrate == "gptq"
    facts = {
        "quant": recipe.quant.model_dump(mode="json"),
        "files": session.checkpoint.revision or session.checkpoint.fingerprint(),
        "text": [recipe.data.train.model_dump(mode="json"), recipe.train.seed] if reads_text else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ models


def splits_base(recipe: Recipe) -> bool:
    """Whether the processes of this run share one base: train.sharding says so and there are several."""
    return recipe.train.sharding == "fsdp" and world() > 1


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
    dense = sum(p.numel() for p in session.checkpoint.empty_model().parameters()) * session.dtype.itemsize
    free = torch.cuda.mem_get_info(session.device)[0]
    if dense * 1.15 < free:
        return str(session.device)
    session.say(
        f"{what} is dense in its reader ({dense / 1e9:.1f} GB, {free / 1e9:.1f} GB free on the GPU): read "
        "on the CPU, slowly"
    )
    return "cpu"


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The quantized base alone."""
    held = [(layer, layer.adapter) for _, layer in adapted_layers(model)]
    for layer, _ in held:
        layer.adapter = None
    try:
        yield
    finally:
        for layer, adapter in held:
            layer.adapter = adapter


# ------------------------------------------------------------------------------------------------ data


def batches(
    session: Session, model: Any, examples: Examples, size: int, *, shuffle: bool, alone: bool = False
) -> Batches:
    """Micro-batches for this process (alone: the only one), with an explicit mask where the model does not
    keep packed segments apart by itself."""
    apart = not (reason := why_not(model)) or keeps_segments_apart(model, size)
    length = session.recipe.data.sequence_len
    if shuffle and reason and length >= LONG and session.recipe.model.attention in ("sdpa", "eager"):
        session.say(f"note: attention holds masks of {length} x {length}: {reason}")
    return Batches(
        examples,
        size,
        session.pad_id,
        session.recipe.train.seed,
        rank=0 if alone else rank(),
        world=1 if alone else world(),
        shuffle=shuffle,
        mask_dtype=None if apart else session.dtype,
    )


def unstopped(session: Session) -> str | None:
    """What the user should know when the model will learn to end its turns with a token that no server stops
    at; None when all is well. Base models with a chat template are such: the turn ends with one token, the
    configuration stops at another."""
    if session.recipe.data.train.format != "chat" or not getattr(session.tokenizer, "chat_template", None):
        return None
    template, stops = ChatTemplate(session.tokenizer), EXPORTERS["native"].stops(session.checkpoint.folder)
    ending = template.ending()
    if len(ending) > 1:
        return (
            f"assistant turns end with the text {template.closing.strip()!r}, which is no single token "
            f"of this tokenizer ({len(ending)} tokens), so that no eos_token_id stops a server there; use a "
            "chat template whose end of turn is a token of this model, or stop servers at that text"
        )
    if not ending or not stops or ending[0] in stops:
        return None
    token = session.tokenizer.convert_ids_to_tokens(ending[0])
    return (
        f"assistant turns end with {token} ({ending[0]}), which is not a stop token of this model "
        f"(eos_token_id {stops}): servers will "
        f"write on behind it; set eos_token_id: {[*stops, *ending]} in the model's generation_config.json"
    )


def valid_batches(session: Session, model: Any) -> Batches | None:
    """data.valid for the losses during training; None when the recipe has none."""
    data = session.recipe.data
    if data.valid is None:
        return None
    examples = load_examples(data.valid, data.model_copy(update={"streaming": False}), session.tokenizer)
    return batches(session, model, examples, session.recipe.train.micro_batch_size, shuffle=False)


def eval_batches(session: Session, model: Any) -> list[Batch]:
    """The windows of the table: eval.data, or data.valid, or the training rows; the first eval.windows of
    eval.window tokens.
    """
    recipe = session.recipe
    source = recipe.eval.data or recipe.data.valid or recipe.data.train
    chosen = first_windows(session, source, recipe.eval.windows, {"sequence_len": recipe.eval.window})
    size = max(1, min(len(chosen), 4096 // recipe.eval.window))
    return list(batches(session, model, chosen, size, shuffle=False, alone=True).one_epoch())


def calibration_batches(session: Session) -> list[Batch]:
    """Token windows for gptq, from quant.calibration.path or the training rows: a seeded choice among the
    first 4 x samples, so that a large or remote data set is not read whole."""
    recipe, wanted = session.recipe, session.recipe.quant.calibration
    source = recipe.data.train
    if wanted.path is not None:
        kind = "text" if Path(wanted.path).suffix == ".txt" else source.format
        source = DataSource(path=wanted.path, format=kind)
    pool = first_windows(
        session, source, 4 * wanted.samples, {"sequence_len": wanted.sequence_len, "train_on": "all"}
    )
    picked = random.Random(recipe.train.seed).sample(range(len(pool)), min(wanted.samples, len(pool)))
    chosen = Examples(pool[i] for i in sorted(picked))
    size = min(len(chosen), max(1, 4096 // wanted.sequence_len))
    found = Batches(chosen, size, session.pad_id, 0, shuffle=False).one_epoch()
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in found]


def first_windows(
    session: Session, source: DataSource, count: int | None, changes: dict[str, Any]
) -> Examples:
    """The first `count` windows (None: all) of a source, read only as far as needed."""
    section = session.recipe.data.model_copy(update={**changes, "streaming": True})
    return Examples(itertools.islice(iter(StreamedExamples(source, section, session.tokenizer)), count))
