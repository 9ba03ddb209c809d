"""dpo: direct preference optimization (arXiv 2305.18290), and losses of its form.

    r = log p(answer) - log p_ref(answer)             of the model and of the packed base without adapters
    h = r(chosen) - r(rejected)

    sigmoid   - log sigma(beta h)
    hinge     max(0, 1 - beta h)                                            (SLiC, arXiv 2305.10425)
    ipo       (r(chosen) / n(chosen) - r(rejected) / n(rejected) - 1 / (2 beta))^2, n tokens of the answer
              (arXiv 2310.12036, Eq. 17, by the mean over tokens as its authors told trl)
    robust    (- (1 - e) log sigma(beta h) + e log sigma(- beta h)) / (1 - 2 e), e = label_smoothing: the
              share of labels that are wrong (arXiv 2403.00409)

Each a mean over pairs, with trl's numbers. The reference is the base itself, its adapters left out
(reference.py): no second model is in memory, and at the first step h is 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import Part
from .pairs import LOG_PROBS, REWARDS, Answers, PairSignal, rewards

# options, r [pairs, 2], n [pairs, 2] -> the losses [pairs]
PairLoss = Callable[[Any, Tensor, Tensor], Tensor]


def _gap(options: Any, r: Tensor) -> Tensor:
    return options.beta * (r[:, 0] - r[:, 1])


def sigmoid(options: Any, r: Tensor, n: Tensor) -> Tensor:
    return -logsigmoid(_gap(options, r))


def hinge(options: Any, r: Tensor, n: Tensor) -> Tensor:
    return torch.relu(1 - _gap(options, r))


def ipo(options: Any, r: Tensor, n: Tensor) -> Tensor:
    mean = r / n.clamp_min(1)
    return (mean[:, 0] - mean[:, 1] - 1 / (2 * options.beta)) ** 2


def robust(options: Any, r: Tensor, n: Tensor) -> Tensor:
    gap, wrong = _gap(options, r), options.label_smoothing
    return (wrong * logsigmoid(-gap) - (1 - wrong) * logsigmoid(gap)) / (1 - 2 * wrong)


DPO_LOSSES: dict[str, PairLoss] = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo, "robust": robust}


class Dpo(PairSignal):
    refers: ClassVar[bool] = True
    keys = frozenset({"beta", "loss_type", "label_smoothing", "reference"})

    def parts(self, options: Any) -> dict[str, Part]:
        told = dict.fromkeys((*REWARDS, *LOG_PROBS), Part(0.0, "pairs", told=True))
        return {"dpo": Part(1.0, "pairs"), **told}

    def of_pairs(
        self, options: Any, ours: Tensor, theirs: Tensor | None, answers: Answers
    ) -> tuple[Tensor, ...]:
        assert theirs is not None, "the reference was not asked"
        policy = answers.log_probs(ours)
        r = policy - answers.log_probs(theirs)
        losses = DPO_LOSSES[options.loss_type](options, r, answers.lengths)
        gains = options.beta * r
        return losses, *rewards(gains[:, 0], gains[:, 1]), *policy.detach().unbind(-1)
