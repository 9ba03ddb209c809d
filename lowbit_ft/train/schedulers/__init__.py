"""Learning-rate curves: train.scheduler. SCHEDULERS is the list.

A curve is a function of (step, total) and nothing else, so there is no state of it to save or to get wrong
when a run is resumed. With s the 0-based step, W warm-up steps, T steps in all, m = min_lr_ratio and
p = (s - W) / (T - W):

    warm-up   (s + 1) / W                     s < W, of every curve: the first step already moves
    linear    m + (1 - m) (1 - p)
    cosine    m + (1 - m) (1 + cos(pi p)) / 2
    wsd       1, then over the last D = decay_ratio T steps m + (1 - m) (T - s) / D
    constant  1
    lota      m + (1 - m) of 1 - 0.98 p / 0.8, and from p = 0.8 on of 0.02 - 0.018 (p - 0.8) / 0.2

To add one: a function in its own file, and one line in SCHEDULERS.
"""

from .base import Left, Scheduler
from .constant import constant
from .cosine import cosine
from .linear import linear
from .lota import lota
from .wsd import wsd, wsd_problem

SCHEDULERS: dict[str, Scheduler] = {
    "linear": Scheduler(linear),
    "cosine": Scheduler(cosine),
    "wsd": Scheduler(wsd, wsd_problem),
    "constant": Scheduler(constant),
    "lota": Scheduler(lota),
}

__all__ = ["SCHEDULERS", "Left", "Scheduler"]
