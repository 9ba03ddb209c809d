"""train.signal.intervention: tensors of the teacher in the student's attention, for the first part of a run
(Teacher Intervention, arXiv 2302.11812).

    place      what is the teacher's in every layer            h is cut off from    learns of the task
    map        the attention probabilities                     q, k                 v, out, FFN
    context    probabilities x v, before the output matrix     q, k, v              out, FFN
    output     the output matrix's result, before the residual q, k, v              FFN

q and k learn from the loss of the scores then; what learns nothing has no gradient. The stream between the
layers stays the student's. A mode says where at a moment of the intervened part of the run:

    gradual     output, then context, then map: first the FFN, then the output matrix, then v, learn on clean
                inputs                                                              boundaries 1/6 and 1/3
    inverted    map, context, output                                                boundaries 1/3 and 2/3
    stochastic  one of the three, drawn for every step
    map, context, output    that one

The paper runs twice, the second time without intervention, from the first one's last checkpoint; here the
first `share` of the steps is intervened in, and the rest is the second run. The place is a function of the
step and the seed: a resumed run, and every process, has the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

Place = Literal["map", "context", "output"]
PLACES: tuple[Place, ...] = get_args(Place)
CUT_OFF: dict[Place, str] = {
    "map": "qk",
    "context": "qkv",
    "output": "qkv",
}  # what reads h and sends nothing back


class Mode:
    """A member of MODES."""

    def __init__(self, *places: Place, boundaries: Sequence[float] = ()) -> None:
        self.places, self.boundaries = places, tuple(boundaries)

    def at(self, moment: float, boundaries: Sequence[float], draw: Callable[[], float]) -> Place:
        """moment: 0 to 1, of the intervened steps; boundaries: where the places change; draw: a number below
        1 of this step."""
        return self.places[sum(moment >= end for end in boundaries)]


class Drawn(Mode):
    def at(self, moment: float, boundaries: Sequence[float], draw: Callable[[], float]) -> Place:
        return self.places[int(draw() * len(self.places))]


MODES: dict[str, Mode] = {
    "gradual": Mode("output", "context", "map", boundaries=(1 / 6, 1 / 3)),
    "inverted": Mode("map", "context", "output", boundaries=(1 / 3, 2 / 3)),
    "stochastic": Drawn(*PLACES),
    **{place: Mode(place) for place in PLACES},
}


def ends(options: Any, total: int) -> int:
    """How many of the steps of a run are intervened in. options: train.signal."""
    return 0 if options.intervention is None else math.ceil(options.intervention.share * total)


def place_at(options: Any, step: int, total: int, seed: int) -> Place | None:
    """Where the teacher intervenes in step `step` (from 0) of `total`; None: nowhere."""
    until, section = ends(options, total), options.intervention
    if step >= until:
        return None
    mode = MODES[section.mode]
    boundaries = mode.boundaries if section.boundaries is None else section.boundaries
    return mode.at(step / until, boundaries, random.Random(f"{seed}/{step}").random)
