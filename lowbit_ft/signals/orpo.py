"""orpo: odds ratio preference optimization (arXiv 2403.07691, Eqs. 6 and 7). No reference.

    l = log p(answer) / tokens of the answer,  odds = p / (1 - p) with p = e^l
    loss = mean over tokens of - log p(token), prompt and answer of the chosen sequences
           + beta * mean over pairs of - log sigma(log odds(chosen) - log odds(rejected))

beta is the paper's lambda. The first mean is over the tokens of the whole global batch; trl has one for every
micro-batch, the same numbers where there is one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import Part
from .pairs import LOG_PROBS, REWARDS, Answers, PairSignal, rewards
from .tokens import IGNORE, in_chosen

ODDS = ("log_odds_ratio", "log_odds_chosen")  # as trl names them: the mean of log sigma, and of what is in it


class Orpo(PairSignal):
    keys = frozenset({"beta"})

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """Every token of a chosen sequence, and those of the rejected answer."""
        where = torch.zeros_like(batch["labels"], dtype=torch.bool)
        where[:, 1:] = in_chosen(batch["position_ids"], batch.get("used"))[:, :-1]
        return batch["input_ids"].where(where | (batch["labels"] != IGNORE), IGNORE)

    def parts(self, options: Any) -> dict[str, Part]:
        told = dict.fromkeys((*REWARDS, *LOG_PROBS, *ODDS), Part(0.0, "pairs", told=True))
        return {"nll": Part(1.0, "chosen"), "odds": Part(options.beta, "pairs"), **told}

    def of_pairs(
        self, options: Any, ours: Tensor, theirs: Tensor | None, answers: Answers
    ) -> tuple[Tensor, ...]:
        mean = answers.log_probs(ours) / answers.lengths.clamp_min(1)
        odds = mean - _log1mexp(mean)
        gap = odds[:, 0] - odds[:, 1]
        ratio, gains = logsigmoid(gap), options.beta * mean
        return (
            -(ours * answers.chosen),
            -ratio,
            *rewards(gains[:, 0], gains[:, 1]),
            *mean.detach().unbind(-1),
            ratio.detach(),
            gap.detach(),
        )


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of x <= 0, by the side of -log 2 that keeps digits (Maechler, 2012); x = 0 is taken for
    the largest number below it, of which the result is finite."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    log = (-torch.expm1(x.where(near, -math.log(2)))).log()
    log1p = torch.log1p(-(x.where(~near, -math.log(2))).exp())
    return log.where(near, log1p)
