"""Where a run is, and what a step that must not be taken does to it.

`Progress` is everything of a checkpoint's state.json that the loop itself changes. A step whose loss or
gradient is NaN or infinite, or that has no target, changes nothing but the position; how many came in a row
is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """Step, tokens and seconds so far; the losses last seen; bad steps, all and in a row."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    evaluated: int = 0
    valid_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    without_gain: int = 0  # evaluations since the best
    bad_steps: int = 0
    bad_in_a_row: int = 0

    def count(self, bad: str | None, loss: float, tokens: int, seconds: float, searching: bool) -> None:
        """One more step. searching: the fp16 loss scaler finds its scale by overflowing, which is no bad
        sign.
        """
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + tokens, self.seconds + seconds
        if bad is None:
            self.loss, self.bad_in_a_row = loss, 0
            return
        self.bad_steps += 1
        self.bad_in_a_row += not searching


def why_bad(loss: float, norm: float, targets: float) -> str | None:
    """Why the step must not be taken, or None."""
    if not targets:
        return "no target tokens in the whole batch"
    if not math.isfinite(loss):
        return f"loss is {loss}"
    return None if math.isfinite(norm) else f"gradient norm is {norm}"
