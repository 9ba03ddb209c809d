"""What train.reconstruct costs: bytes on the device, and work."""

from __future__ import annotations

from ..grid.calibrate.descent import CHECKS
from ..quantize.memory import quantize_memory
from ..recipe.recipe import Recipe
from .costs import Step
from .model import Skeleton


def reconstruct_bytes(recipe: Recipe, made: Skeleton, step: Step) -> int:
    """What train.reconstruct needs on the device beside the packed model: the walk with one dense layer; then
    a micro-batch through one packed layer and back, with the layer's gradients, Adam's averages and best
    state."""
    section, train = recipe.train.reconstruct, recipe.train
    assert section is not None
    tokens = section.micro_batch_size * section.sequence_len
    share = tokens / (train.micro_batch_size * recipe.data.sequence_len)
    walk = quantize_memory(recipe, made.shapes)
    forward = max(cost.evaluation for cost in step.layers) * share
    both = max(cost.backward for cost in step.layers) * share
    masters = max((masters for _, masters in made.block_bytes.values()), default=0)
    return round(max(walk.outside + walk.layer + forward, walk.outside + both + 4 * 4 * masters))


def reconstruct_tokens(recipe: Recipe) -> int:
    """Tokens of training that cost as much as train.reconstruct: a step passes one layer forward and back, a
    look at the loss or a pass of a stream one third of that, both in every layer once."""
    section = recipe.train.reconstruct
    if section is None:
        return 0
    passes = (CHECKS + 1) + 2  # looks at the loss; the dense layer's outputs and the packed layer's
    size = section.sequence_len
    return section.steps * section.micro_batch_size * size + passes * section.samples * size // 3


def reconstruct_words(recipe: Recipe, rate: float | None) -> str:
    """A line of `plan`. rate: tokens per second of training, where they are known."""
    section, alike = recipe.train.reconstruct, reconstruct_tokens(recipe)
    assert section is not None
    tokens = section.micro_batch_size * section.sequence_len
    return (
        f"reconstruct: {section.steps} steps of {tokens:,} tokens in every decoder layer on {section.inputs} "
        f"inputs, as much work as training on {alike:,} tokens"
        + (f", about {duration(alike / rate)}" if rate else "")
    )


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
