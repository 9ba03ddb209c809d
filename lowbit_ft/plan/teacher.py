"""What train.teacher adds to a plan: what it holds on the device and on the disk, and its forwards."""

from __future__ import annotations

import torch

from ..model.conv import PackedConv2d
from ..recipe.recipe import Recipe
from ..signals import REFERENCES, SIGNALS, Costs, teacher_kind
from ..stages.teacher import ROWS
from ..tasks.labelled import Labelled
from .model import Skeleton


def teacher_costs(recipe: Recipe, made: Skeleton) -> Costs:
    """Of the teacher that the signal asks, or the reference; nothing where it asks none."""
    train, signal = recipe.train, SIGNALS[recipe.train.signal.kind]
    if signal.refers:
        name = train.signal.reference
        return REFERENCES[name].costs(recipe, name, 0, 0, 0)
    if not signal.asks or train.teacher is None:
        return Costs(asked=False)
    sizes = {row.layer: row.out_features * row.in_features for row in made.rows}
    weights = sum(sizes.values())
    beside = sum(made.held[part] for part in ("embeddings", "head", "norms and other"))
    named = made.model.named_modules()
    dense = sum(sizes.get(name, 0) for name, module in named if isinstance(module, PackedConv2d))
    if dense < weights:  # another model keeps its convolutions dense, beside linears (stages/models.py)
        weights, beside = weights - dense, beside + dense * getattr(torch, recipe.model.dtype).itemsize
    vocabulary = getattr(made.model.config.get_text_config(), "vocab_size", 0)
    return teacher_kind(train.teacher).costs(recipe, train.teacher, weights, beside, vocabulary)


def layer_bytes(recipe: Recipe, made: Skeleton, states: int) -> int:
    """Of a signal of layers, beside what eager attention holds (costs.attends): the errors of every layer, in
    fp32, for the backward, and the teacher's layer at work: its stream and taps. Of a task whose states are
    compared whole (`states` numbers): the teacher's, and their errors."""
    train = recipe.train
    if not SIGNALS[train.signal.kind].of_layers:
        return 0
    weights, size = train.signal.weights, getattr(torch, recipe.model.dtype).itemsize
    if recipe.task.states:
        return states * (size + 4) if weights["hidden"] else 0
    config, tokens = made.model.config.get_text_config(), train.micro_batch_size * recipe.data.sequence_len
    wide = tokens * config.hidden_size
    maps = tokens * recipe.data.sequence_len * config.num_attention_heads
    errors = wide * (bool(weights["hidden"]) + bool(weights["outputs"])) + maps * bool(weights["scores"])
    taps = 4 * wide + 2 * maps * SIGNALS[train.signal.kind].reads_maps(train.signal)
    return made.layers * errors * 4 + taps * size


def measuring_bytes(recipe: Recipe, made: Skeleton, layer: int) -> int:
    """What is held beside the student while a teacher of a task with rows is measured before training
    (stages/teacher.py): the teacher, the dense model, and a batch through one of the three; 0 where none is.
    layer: the peak of a forward of a micro-batch."""
    costs, task = teacher_costs(recipe, made), recipe.task
    if not costs.live or not isinstance(task, Labelled):
        return 0
    batch = layer * (task.measured or ROWS) // recipe.train.micro_batch_size
    return costs.held + made.dense_bytes + batch


def teacher_notes(recipe: Recipe, made: Skeleton) -> list[str]:
    """What the teacher costs in time, in words: of a step, a forward is a third, or a quarter where the
    layers are recomputed."""
    costs = teacher_costs(recipe, made)
    if not costs.asked:
        return []
    step = 4 if recipe.train.gradient_checkpointing else 3
    share = f"; about {100 * costs.forwards / step:.0f} % more time per step" if costs.forwards else ""
    if costs.before:
        share = f"; before training at most {100 * costs.before / step:.0f} % of the time of training, once"
    train = recipe.train
    refers = SIGNALS[train.signal.kind].refers
    asked = f"reference {train.signal.reference}" if refers else f"teacher {train.teacher}"
    return [f"signal {train.signal.kind}, {asked}: {costs.note}{share}"]
