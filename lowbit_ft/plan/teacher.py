"""What train.teacher adds to a plan: what it holds on the device and on the disk, and its forwards."""

from __future__ import annotations

from ..recipe.recipe import Recipe
from ..signals import SIGNALS, Costs, teacher_kind
from .model import Skeleton


def teacher_costs(recipe: Recipe, made: Skeleton) -> Costs:
    """Of the teacher that the signal asks; nothing where it asks none."""
    train = recipe.train
    if not SIGNALS[train.signal.kind].asks or train.teacher is None:
        return Costs(asked=False)
    weights = sum(row.out_features * row.in_features for row in made.rows)
    beside = sum(made.held[part] for part in ("embeddings", "head", "norms and other"))
    vocabulary = getattr(made.model.config.get_text_config(), "vocab_size", 0)
    return teacher_kind(train.teacher).costs(recipe, train.teacher, weights, beside, vocabulary)


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
    return [f"signal {train.signal.kind}, teacher {train.teacher}: {costs.note}{share}"]
