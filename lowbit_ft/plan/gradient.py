"""What train.gradient adds to a plan: what it holds beside what trains, the moments of its own forwards, and
its time in words; and what a step on a D holds that is not in fp32.
"""

from __future__ import annotations

from ..adapters.dense import held_short
from ..recipe.recipe import Recipe
from ..train.optimizers.masters import AT_WORK, SLICE
from .costs import Step
from .model import Skeleton

MASTERS = "moved tensors"
Moment = tuple[int, str, dict[str, int]]


def own_moments(recipe: Recipe, step: Step, made: Skeleton) -> list[Moment]:
    """Moments of a step that backprop does not have: forwards that keep nothing, with copies of what they
    move; and all gradients made at once."""
    config, trained = recipe.train.gradient, made.trainable
    if held_short(recipe.adapter) is not None:  # estimates do not go with it
        work = AT_WORK * min(max(made.trained), SLICE)
        parts = {"saved layer inputs": 0, "gradients": made.trained_bytes, "workspace": work}
        return [(sum(parts.values()), "the step of the optimizer", parts)]
    if not config.masters:
        return []
    beside = {MASTERS: config.masters * trained, "gradients": 4 * trained if config.backward else 0}
    layers = step.frame + max((cost.evaluation for cost in step.layers), default=0)
    work = {"the layers": {"one layer": layers}, "the loss": {"loss": step.tail.evaluation}}
    found = []
    for name, own in work.items():
        parts = {"saved layer inputs": 0, **beside, **own}
        found.append((sum(parts.values()), f"{name} of a forward without gradient", parts))
    parts = {"saved layer inputs": 0, "gradients": 4 * trained}
    return [*found, (sum(parts.values()), "the estimate of the gradient", parts)]


def kept_bytes(recipe: Recipe, made: Skeleton) -> int:
    """What it holds between the steps."""
    return recipe.train.gradient.kept * made.trainable


def gradient_notes(recipe: Recipe) -> list[str]:
    """What it costs in time; and that it is not backprop."""
    gradient = recipe.train.gradient
    if recipe.train.max_steps == 0:  # reconstruct only: no step of it is taken
        return []
    told = gradient.told(recipe.train.gradient_checkpointing)
    found = [told] if told else []
    if gradient.cage is not None:
        product = "" if recipe.adapter.dense_delta else ", and a product with the rows of A"
        found.append(
            f"gradient cage: behind {gradient.cage.silence:.0%} of the run, every layer's values once more "
            f"per step{product}"
        )
    return found
