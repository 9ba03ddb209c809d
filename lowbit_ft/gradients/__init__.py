"""gradients: how the gradient of a step is made, and what is done to the weights behind it.

A step: the loop counts the positions of its micro-batches; then the member leaves .grad on what trains, by
as many forwards, with a backward or without, as it likes (`Gradient.fill`); the loop clips it, asks whether
it is a number, and steps; then the member may move the tensors once more (`Gradient.after_step`). It touches
what trains and nothing else, and gives back what it moved, bit for bit.

    backprop       the straight-through gradient of the ops
    fogzo          backprop's direction, weighed by two more forwards
    zeroth_order   two forwards along a random direction, no backward
    cage           beside any of them: a pull of the weights to their codes
    base.py, config.py   the contract
    directions.py        random directions, drawn anew from seeds; moving tensors and putting them back

A member is a file with its config (its keys, what it refuses, what it costs) and its Gradient, and a line in
GRADIENTS. `backprop` is the loop as it would be without this folder."""

from .backprop import BackpropConfig
from .base import Gradient, Making, Window
from .config import GradientConfig
from .fogzo import FogzoConfig
from .zeroth_order import ZerothOrderConfig

GRADIENTS: dict[str, type[GradientConfig]] = {
    "backprop": BackpropConfig,
    "fogzo": FogzoConfig,
    "zeroth_order": ZerothOrderConfig,
}

USUAL = "backprop"  # the kind of a section that names none

__all__ = ["GRADIENTS", "USUAL", "BackpropConfig", "Gradient", "GradientConfig", "Making", "Window"]
