"""logits: the divergence from the teacher's next-token distribution, T^2 KL(teacher, student)
(divergence.py).

A teacher says more of a position than one token does, and it says it of positions that have no label. What it
cannot do is know the user's task: with it alone the run stays as near to the teacher as the grid allows.
"""

from typing import Any, ClassVar

from torch import Tensor

from .base import Given, Part, Signal, Sparse, Whole
from .divergence import both_have, divergence, most_likely
from .tokens import IGNORE


def compared(options: Any, logits: Tensor, tokens: Tensor, counted: Tensor, given: Given | None) -> Tensor:
    """The divergence part of a signal, summed over the positions it counts."""
    assert isinstance(given, Whole | Sparse), "a teacher was not asked"
    if isinstance(given, Whole):
        logits, given = both_have(logits, given)  # before a choice: the student has to have what is chosen
    if options.top_k is not None:
        given = most_likely(given, options.top_k, options.temperature)
    where = counted if options.on == "all" else tokens != IGNORE
    return divergence(logits, given, where, options.temperature, options.divergence)


class Logits(Signal):
    language: ClassVar[bool] = False
    keys = frozenset({"temperature", "top_k", "on", "divergence"})

    def parts(self, options: Any) -> dict[str, Part]:
        return {"logits": Part(1.0, options.on)}

    def sums(
        self, options: Any, logits: Tensor, tokens: Tensor, counted: Tensor, given: Given | None
    ) -> tuple[Tensor, ...]:
        return (compared(options, logits, tokens, counted, given),)
