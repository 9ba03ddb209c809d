"""train: adapters on the packed base, fitted to the dense layers if the recipe says so, trained, and adapter/
written.
"""

import gc
from collections.abc import Sized
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .. import merge as merging
from ..adapters.attach import adapter_state, attach, base_digest, begin_step, prune_by, train_head, zeros_of
from ..adapters.lora_start import read_lora, start_from_lora
from ..adapters.rates import rate_for
from ..adapters.reach import reach
from ..data.windows import Examples
from ..export import EXPORTERS
from ..export.writer import check_writable
from ..integrations.adapter_files import Head, write_adapter
from ..model.fused import fusions_in
from ..model.purpose import head_parameters, head_parts
from ..model.shards import is_sharded, whole
from ..recipe.sections.train import TrainSection
from ..rotations import FoldedCheckpoint
from ..session import Session
from ..signals import Lesson
from ..train.loop import train
from ..train.memory import release_freed
from ..train.optim import lr_factor
from ..train.processes import world
from ..train.setup import total_steps
from ..train.sharding import held_by_rank, shard
from .data import batches, valid_batches
from .models import adapter_of, trained_model
from .reconstruct import reconstruct_stage
from .student import start_from_run
from .teacher import lesson_of


class RunStopped(Exception):
    """A signal stopped training; everything is saved and the same command goes on."""


def train_stage(session: Session, model: Any, examples: Examples) -> Any:
    """Attach, reconstruct and train (train.max_steps: 0 leaves it at that); writes adapter/. Returns the
    trained model, whole, on the main process and None on the others. RunStopped when a signal ended it before
    the last step."""
    recipe, run_dir = session.recipe, session.run
    attach_adapters(session, model)
    # Before hours of training, not after: can the format hold what this will become?
    specs = merging.merged_weights(model).specs
    check_writable(merging.shipped(model, session.folded), specs, EXPORTERS[recipe.export.format])
    if recipe.train.max_steps != 0 and recipe.train.reconstruct is None:  # which moves codes itself
        warn_of_rate(session, model, examples)
    digest = base_digest(model)
    started = start_from_run(session, model, digest)
    fitted = reconstruct_stage(session, model)
    # It is judged against the student as it will start.
    lesson = lesson_of(session, model, examples, fitted) if recipe.train.max_steps != 0 else None
    share_base(session, model)
    if lesson is not None:
        optimize(session, model, examples, lesson, {"base": digest, **_begun(started, fitted)})
    # by all processes, for the one that writes
    state = {key: whole(tensor) for key, tensor in adapter_state(model).items()}
    if not run_dir.main:
        return None
    session.check_files()
    write_adapter(
        run_dir / "adapter", state, adapter_of(session), digest, run_dir / "base", _head(session, model)
    )
    run_dir.made("adapter")
    if not session.splits_base:
        return model
    del model, state  # shards make room for the whole base; hooks tie them into cycles
    gc.collect()
    release_freed()
    return trained_model(session)


def _begun(started: str | None, fitted: str | None) -> dict[str, str]:
    """What the adapters were before the first step, where they are not fresh: those of another run, or fitted
    to the dense layers."""
    return {name: said for name, said in (("start", started), ("reconstruct", fitted)) if said is not None}


def optimize(
    session: Session, model: Any, examples: Examples, lesson: Lesson, begins: dict[str, str]
) -> None:
    """The training steps. lesson: what the loss is made of; begins: what they begin with, which a resumed run
    must begin with, too. RunStopped when a signal ended it before the last step.
    """
    recipe, run_dir = session.recipe, session.run
    meta: dict[str, Any] = {**begins, "adapter": recipe.adapter.model_dump(mode="json")}
    if recipe.model.add_tokens is not None:
        meta["new tokens"] = recipe.model.add_tokens.model_dump(mode="json")
    size = recipe.train.micro_batch_size
    windows = batches(session, model, examples, size, shuffle=True, taught=lesson.taught)
    gradual = recipe.quant.sparsity.gradual(total_steps(recipe.train, windows))
    if gradual is not None:
        prune_by(model, gradual)
        meta["sparsity"] = recipe.quant.sparsity.model_dump(mode="json")
    with run_dir.stage("train", session.device, resumable=True):
        told = passes(recipe.train, examples, total_steps(recipe.train, windows), recipe.task.unit)
        if told is not None:
            session.say(told)
        result = train(
            model,
            windows,
            valid_batches(session, model, taught=lesson.signal.pairs),
            recipe.train,
            run_dir.path,
            meta=meta,
            resume=True,
            on_step=partial(begin_step, model),
            choose_after=getattr(recipe.adapter, "warmup_steps", 0),
            pruned_at=0 if gradual is None else gradual.last,
            after_step=session.check_files,
            lesson=lesson,
            goal=recipe.task.goal,
            console=session.console,
        )
    if result.stopped:
        raise RunStopped(
            f"stopped at step {result.steps}; everything is saved. The same command goes on from there"
        )
    if gradual is not None:
        tell_zeros(session, model)


def tell_zeros(session: Session, model: Any) -> None:
    """Of a model that was pruned while it trained: how many of its weights are zero by that."""
    counts = zeros_of(model)
    zeros, weights = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    layers = {name: {"zeros": zero, "parameters": all_} for name, (zero, all_) in counts.items()}
    session.run.write_json("zeros.json", {"zeros": zeros / weights, "layers": layers})
    session.say(f"zeros: {zeros:,} of {weights:,} weights ({zeros / weights:.1%}), in {len(counts)} layers")


def passes(section: TrainSection, examples: Any, steps: int, unit: str) -> str | None:
    """How often training sees its windows (or other `unit`); None for a stream, whose length nobody knows."""
    if not isinstance(examples, Sized):
        return None
    each, count = section.micro_batch_size * section.gradient_accumulation_steps * world(), len(examples)
    return f"train: {steps:,} steps of {each:,}, {steps * each / count:.3g} passes over {count:,} {unit}"


def attach_adapters(session: Session, model: Any) -> None:
    """The recipe's adapters on the packed layers, started from the seed or from adapter.init_from; says what
    trains.
    """
    recipe, run_dir = session.recipe, session.run
    config = adapter_of(session)
    torch.manual_seed(recipe.train.seed)
    session.folded.take_apart(fusions_in(model))
    rows = attach(model, config, lambda layer: session.folded.matrix(layer, dtype=torch.float32))
    if recipe.task.trains_head:
        head = head_parameters(model, recipe.train.signal.learns_labels)
        rows = replace(rows, rows=[*rows.rows, *train_head(model, head)])
    if drawn := session.checkpoint.drawn:
        other = " for these labels" if session.checkpoint.relabelled else ""
        session.say(
            f"head: drawn by train.seed, for the checkpoint has none of it{other} ({', '.join(drawn)}); "
            "so it is measured in the table before training"
        )
    run_dir.write_json("trainable.json", rows.to_json())
    session.say(rows)
    if folder := getattr(recipe.adapter, "init_from", None):
        folded = session.folded
        turned = folded.turn_lora if isinstance(folded, FoldedCheckpoint) else None
        started = start_from_lora(model, config, read_lora(folder), turned)
        run_dir.write_json("lora_start.json", started.to_json())
        session.say(started)


def _head(session: Session, model: Any) -> Head:
    """What the adapter folder says of the model beside the packed layers."""
    task, signal = session.recipe.task, session.recipe.train.signal
    modules = head_parts(model, signal.learns_labels) if task.trains_head else []
    return Head(task.peft, task.auto, modules)


def warn_of_rate(session: Session, model: Any, examples: Examples) -> None:
    """Say it when no code can move at this learning rate in this many steps, with the rate it takes."""
    section = session.recipe.train
    windows = batches(session, model, examples, section.micro_batch_size, shuffle=False)
    total = total_steps(section, windows)
    factors = sum(lr_factor(section, step, total) for step in range(total))
    rate = section.learning_rate
    assert rate != "auto", "resolved when the recipe was read"
    first = section.betas[0]
    found = reach(model, rate * factors, (1 - first**total) / (1 - first))
    if found is None or 2 * found.still < found.layers:
        return
    usual, _ = rate_for(session.recipe.adapter.method, session.recipe.quant.bits)
    least = found.needed / factors
    length = "epochs" if section.max_steps is None else "max_steps"
    way_out = (
        f"set train.learning_rate: auto, which is {usual:g} here (a LoRA's rate is too small: what is "
        "trained must cross a step of the grid)"
        if least <= usual
        else f"so few steps reach none at the usual {usual:g} either: raise train.{length}"
    )
    session.say(
        f"warning: train.learning_rate {rate:g} for {total} steps moves no code in "
        f"{found.still} of {found.layers} layers: what moves weights stays below the distance to the next "
        f"code, and only scales train. In so many steps a first code moves at {least:.1g}; {way_out}"
    )


def share_base(session: Session, model: Any) -> None:
    """Cut the base over the processes where train.sharding says so; with several processes, write and say
    what each holds of it.
    """
    if session.splits_base:
        shard(model, session.device)
    if world() > 1:
        ranks = held_by_rank(model, session.device)
        session.run.write_json(
            "processes.json", {"type": "FSDP2" if is_sharded(model) else "DDP", "ranks": ranks}
        )
        parts = ", ".join(f"{r['base'] / 1e9:.6f}" for r in ranks)
        session.say(
            f"packed base of {ranks[0]['whole_base'] / 1e9:.6f} GB, held by {len(ranks)} "
            f"processes: {parts} GB"
        )
