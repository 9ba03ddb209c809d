"""train.gradient: its fields are the config class of its kind (lowbit_ft/gradients); here is whether it goes
with the rest of the recipe.
"""

from __future__ import annotations

from typing import Any

from ..yaml import Problem
from .base import Problems


def check_gradient(r: Any) -> Problems:
    """The way a gradient is made against the method, the loop and its memory: each kind says what of a recipe
    it does not go with."""
    for key, message in r.train.gradient.problems(r):
        yield Problem(key, message)
