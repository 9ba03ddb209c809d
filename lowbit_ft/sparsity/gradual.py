"""Gradual: zeros that come while a model trains, more and more of them (quant.sparsity.schedule).

Of a run's steps `first` to `last` (0-based, each before its forward) zeros are chosen anew every `every`
steps, and at `last`, as the weights are then (Zhu and Gupta, arXiv 1710.01878, from no zeros on):

    share(t) = amount (1 - (1 - (t - first) / (last - first))^3)

Most go early, when there are many to choose from. Behind `last` the zeros stay where they are.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gradual:
    """kind, pattern: members of SPARSITY and PATTERNS; amount: the share of each matrix at the end."""

    kind: str
    amount: float
    pattern: str
    first: int
    last: int
    every: int

    @classmethod
    def of(
        cls, kind: str, amount: float, pattern: str, total: int, *, start: float, end: float, every: int
    ) -> "Gradual":
        """Of a run of `total` steps, from the share `start` of them to `end`: the last one trains with all
        zeros."""
        last = min(round(end * total), total - 1)
        return cls(kind, amount, pattern, min(round(start * total), last), last, every)

    def share(self, step: int) -> float | None:
        """What is to be zero from this step on; None: nothing is chosen before it."""
        if not self.first <= step <= self.last:
            return None
        if step == self.last:
            return self.amount
        if (step - self.first) % self.every:
            return None
        return self.amount * (1 - (1 - (step - self.first) / (self.last - self.first)) ** 3)
