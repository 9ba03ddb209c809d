"""train.gradient: its fields are the config class of its kind (lowbit_ft/gradients); here is whether it goes
with the rest of the recipe.
"""

from __future__ import annotations

from typing import Any

from ...train.optim import lr_factor
from ..yaml import Problem
from .base import Problems


def check_gradient(r: Any) -> Problems:
    """The way a gradient is made against the method, the loop and its memory: each kind says what of a recipe
    it does not go with."""
    for key, message in r.train.gradient.problems(r):
        yield Problem(key, message)
    train, cage = r.train, r.train.gradient.cage
    if cage is None or not train.max_steps or isinstance(train.learning_rate, str):
        return  # with epochs the number of steps is known with the data
    steps = range(train.max_steps)
    try:
        cage.raw([train.learning_rate * lr_factor(train, step, len(steps)) for step in steps])
    except ValueError as error:
        yield Problem(("train", "gradient", "cage"), f"got lambda {cage.strength!r}: {error}")
