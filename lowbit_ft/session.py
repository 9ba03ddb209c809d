"""Session: what every stage of a run needs (recipe, run folder, checkpoint, tokenizer, device, console).

A session is opened on a recipe (`start`, which makes or continues the run folder) or on the folder of a run
that is there (`resume`). One that writes holds the folder's lock until it is closed: use it in a `with`.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .data.codecs import codec_of_rows
from .export.grown_folder import write_grown
from .files.jsonfile import read_json
from .files.opened import LastWords, OpenedFiles
from .files.records import Environment
from .files.tensorfile import CheckpointError
from .model.chat_template import chosen
from .model.checkpoint import Checkpoint
from .model.config import read_config
from .model.grown import GrownCheckpoint, add_tokens, tables_of
from .model.images import read_processor
from .model.load import load_tokenizer
from .model.tokenizer import pad_id
from .recipe.defaults import settled, taken
from .recipe.layers import local_folder, read_shapes
from .recipe.recipe import Recipe, check_recipe
from .recipe.sections.chat import with_template
from .recipe.yaml import RecipeError
from .rotations import FILE, FoldedCheckpoint, Rotation, RotationFile
from .rundir import RunDir, environment
from .speech.tokens import AUDIO_CODEC
from .tasks.base import Feed
from .train.processes import join, main_process_first, rank, world


@dataclass
class Session:
    """The recipe, its run folder, the checkpoint and its tokenizer, and where to compute."""

    recipe: Recipe
    run: RunDir
    checkpoint: Checkpoint
    tokenizer: Any
    device: torch.device
    console: Console
    base: OpenedFiles | None = None  # the files of base/ that this run computes with
    words: LastWords | None = None  # for a run that loses their pages
    turned: FoldedCheckpoint | None = None  # see `folded`

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        if self.words is not None:
            self.words.goodbye()
        self.run.close()

    def watch(self, base: Path) -> OpenedFiles:
        """From here on know whether the files of base/ are still the ones that are there now."""
        if self.words is not None:
            self.words.goodbye()
        self.base = OpenedFiles(base)
        if self.run.main and self.device.type == "cpu":  # where they stay mapped while the run computes
            self.words = LastWords(self.base)
        return self.base

    def check_files(self) -> None:
        """FileError when the files of base/, or the run folder, are no longer the ones that were opened."""
        if self.base is not None:
            self.base.check()
        if self.run.lock is not None:
            self.run.lock.check()

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.recipe.model.dtype)

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer)

    @property
    def feed(self) -> Feed:
        """What the batches of this process are made with."""
        return Feed(self.recipe, self.tokenizer, rank(), world(), self.say)

    @cached_property
    def rows(self) -> int | None:
        """Tokens that the model has an embedding of; None when its name tells nothing."""
        if isinstance(self.checkpoint, GrownCheckpoint):
            return self.checkpoint.new.rows
        return read_shapes(self.checkpoint.folder).rows

    @property
    def folded(self) -> Checkpoint:
        """The checkpoint as it is packed: turned and smoothed as base/ says (quant.rotation, quant.smooth),
        else as it is. Whoever writes or compares tensors of the packed model reads this one; what is asked
        as full precision (evaluation, teachers) is `checkpoint`, whose logits are the same.
        """
        if not self.recipe.quant.folds:
            return self.checkpoint
        if self.turned is None:
            places = [self.run / name / FILE for name in ("base", "merged")]
            found = next((path for path in places if path.is_file()), None)
            if found is None:
                raise ValueError(f"{self.run.path}: no {FILE} in base/ or merged/; run the line again")
            fix = f"a file of this run was changed; put it back, or remove {found.parent}"
            rotation = Rotation.of(read_json(found, RotationFile, fix))
            self.turned = FoldedCheckpoint(self.checkpoint, rotation)
        return self.turned

    @property
    def splits_base(self) -> bool:
        """Whether the processes of this run share one base: train.sharding says so and there are several."""
        return self.recipe.train.sharding == "fsdp" and world() > 1

    def say(self, text: object) -> None:
        """Print on the main process."""
        if self.run.main:
            self.console.print(str(text), highlight=False, soft_wrap=True, markup=False)


def start(recipe: Recipe) -> Session:
    """Make the run folder (or continue in it), hold it, and open the checkpoint; no weight is read yet."""
    RunDir(recipe.output).refuse_foreign()
    device = pick_device(recipe.model.device)
    main = join(device)
    # The low-rank product that makes codes is fp32; a process that trained with TF32 would merge other codes
    # without it.
    torch.set_float32_matmul_precision("highest")
    with main_process_first():
        stored = RunDir(recipe.output, main=False).read_json("environment.json", Environment | None, None)
        # A branch of a hub model moves on; a run stays with the commit it began with.
        revision = recipe.model.revision or (stored.revision if stored else None)
        if local_folder(recipe.model.path, revision) is None:
            Checkpoint.open(
                recipe.model.path, revision, recipe.model.dtype
            )  # fetched, before its grid is asked for
        recipe, against = settled(recipe)
        recipe, wrong = with_template(recipe)
        if against := [*against, *wrong]:
            raise RecipeError([str(problem) for problem in against])
        if not recipe.task.language:  # labels that only rows and checkpoint know
            folder = local_folder(recipe.model.path, revision)
            config = read_config(folder) if folder is not None else {}
            recipe = recipe.model_copy(update={"task": recipe.task.settled(recipe, config)})
        run = RunDir.start(recipe) if main else RunDir(recipe.output, main=False)
        try:
            checkpoint = _open(recipe, revision)
            if checkpoint.revision is not None and (problems := check_recipe(recipe)):
                # A hub model has only now been fetched: its layers can be checked against grid and format.
                raise RecipeError([str(problem) for problem in problems])
            if stored is None:
                facts = {"model": recipe.model.path, "revision": checkpoint.revision, "device": str(device)}
                run.write_json("environment.json", environment() | facts)
            checkpoint, tokenizer = _with_tokenizer(recipe, run, checkpoint, writes=True)
        except BaseException:
            run.close()
            raise
    session = Session(recipe, run, checkpoint, tokenizer, device, Console())
    session.say(
        f"{recipe.name}: {recipe.model.path} ({checkpoint.revision or 'local'}) on {device}, "
        f"{recipe.model.dtype}"
    )
    for line in taken(recipe):
        session.say(line)
    return session


def resume(run_dir: Path, writes: bool = False) -> Session:
    """The session of a run that is there. writes: it will write there, so it holds the folder."""
    run = RunDir(run_dir)
    if writes:
        run.hold()
    try:
        return _opened(run)
    except BaseException:
        run.close()
        raise


def _opened(run: RunDir) -> Session:
    recipe, given = run.recipe_here(), run.recipe().model.path
    revision = recipe.model.revision or run.read_json("environment.json", Environment, Environment()).revision
    try:
        checkpoint = _open(recipe, revision)
    except CheckpointError as error:
        if local_folder(recipe.model.path, revision) is not None:
            raise
        looked = [str(folder) for folder in dict.fromkeys([*run.started(), Path.cwd()])]
        raise CheckpointError(
            f"{error}; looked for in {', '.join(looked)}; set model.path in {run / 'recipe.yaml'} to where "
            "the checkpoint is now"
        ) from error
    checkpoint.source = given  # what is written says the same from every folder
    torch.set_float32_matmul_precision("highest")
    checkpoint, tokenizer = _with_tokenizer(recipe, run, checkpoint)
    return Session(recipe, run, checkpoint, tokenizer, pick_device(recipe.model.device), Console())


def _with_tokenizer(
    recipe: Recipe, run: RunDir, checkpoint: Checkpoint, writes: bool = False
) -> tuple[Checkpoint, Any]:
    """The checkpoint and its tokenizer (its image processor, where the task looks at images), with the chat
    template of the recipe, which ships with it, and the new tokens of model.add_tokens; writes: the folder
    model/ of the run, with the files of both, is made."""
    if recipe.task.reads == "images":
        return checkpoint, read_processor(checkpoint.folder)
    data, wanted = recipe.data, recipe.model.add_tokens
    checkpoint.chat_template = chosen(
        load_tokenizer(checkpoint), data.chat_template, data.chat_template_kwargs
    )
    tokenizer = load_tokenizer(checkpoint)
    if wanted is None:
        return checkpoint, tokenizer
    key = next(iter(tables_of(checkpoint).values()))
    rows = checkpoint.shape(key)[0]
    new = add_tokens(tokenizer, wanted.every, wanted.special, wanted.copied, rows, wanted.levels)
    if writes and run.main:
        codec = None if wanted.audio is None else codec_of_rows(data, recipe.eval.data)
        says = {} if codec is None else {AUDIO_CODEC: codec}
        write_grown(run / "model", checkpoint, tokenizer, new.rows, says)
    return GrownCheckpoint(checkpoint, run / "model", new), tokenizer


def _open(recipe: Recipe, revision: str | None) -> Checkpoint:
    purpose = recipe.task.purpose(recipe.train.seed)
    return Checkpoint.open(recipe.model.path, revision, recipe.model.dtype, purpose=purpose)


def pick_device(wanted: str) -> torch.device:
    """model.device: auto is the GPU when there is one; under torchrun each process takes its own."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device: cuda, but torch sees no GPU here; set model.device: cpu (or auto)")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if wanted == "cuda" else "cpu")
