"""What the signals of preference rows share: from log-probabilities of tokens to those of whole answers.

A window of such rows is a chosen sequence, a rejected one, and so on: prompt and answer each, every one a
segment (data/formats/preference.py). A loss over pairs is no sum over positions, so of a chunk of logits the
log-probabilities of the tokens are kept, one number for a position (`sums`), and when all chunks are through,
the pairs' losses are made of their sums (`joined`):

    log p(answer) = sum over its tokens of log p(token | what stands before it)

Sums run in fp64, sequence after sequence: no atomic adds, so a resumed run has the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model.upload import upload
from .base import Given, Known, Looked, Signal
from .tokens import IGNORE, next_tokens, pair_count, sequence_numbers, token_log_probs


@dataclass(frozen=True)
class Answers:
    """The sequences of a micro-batch, chosen and rejected in turn. sizes: positions of each among those that
    were looked at; lengths fp64 [pairs, 2]: tokens of each answer that are predicted; answer bool [r]:
    whether a looked-at position predicts a token of an answer; chosen bool [r]: whether it is of a chosen
    sequence. Tensors on the device."""

    sizes: list[int]
    lengths: Tensor
    answer: Tensor
    chosen: Tensor

    @classmethod
    def of(cls, looked: Looked, device: torch.device) -> Answers:
        batch, where = looked.batch, torch.as_tensor(looked.where)
        numbers = sequence_numbers(batch["position_ids"]).reshape(-1)
        answer = next_tokens(batch["labels"]).reshape(-1) != IGNORE
        count = int(numbers[-1]) + 1
        pairs = int(pair_count(batch["position_ids"]))
        lengths = torch.bincount(numbers[answer], minlength=count)[: 2 * pairs].double().view(pairs, 2)
        return cls(
            torch.bincount(numbers[where], minlength=count)[: 2 * pairs].tolist(),
            upload(lengths, device),
            upload(answer[where], device),
            upload(numbers[where] % 2 == 0, device),
        )

    def log_probs(self, said: Tensor) -> Tensor:
        """log p of looked-at positions [r] -> of answers, fp64 [pairs, 2]."""
        if not self.sizes:
            return said.new_zeros((0, 2), dtype=torch.float64)
        of_answers = (said * self.answer).double()[: sum(self.sizes)]
        return torch.stack([part.sum() for part in of_answers.split(self.sizes)]).view(-1, 2)


class PairSignal(Signal):
    """A member of SIGNALS that learns from pairs."""

    asks: ClassVar[bool] = False
    pairs: ClassVar[bool] = True

    def sums(
        self, options: Any, logits: Tensor, tokens: Tensor, counted: Tensor, given: Given | None
    ) -> tuple[Tensor, ...]:
        """Of every position of a chunk the log-probability of its token [r], and what the teacher says."""
        ours = token_log_probs(logits, tokens)
        if given is None:
            return (ours,)
        assert isinstance(given, Known), "a reference says the log-probability of a token"
        return ours, given.log_p

    def joined(self, options: Any, chunks: Sequence[tuple[Tensor, ...]], looked: Looked) -> Tensor:
        ours, *theirs = (torch.cat(column) for column in zip(*chunks, strict=True))
        answers = Answers.of(looked, ours.device)
        parts = self.of_pairs(options, ours, theirs[0] if theirs else None, answers)
        return torch.stack([part.double().sum() for part in parts]).to(ours.dtype)

    def of_pairs(
        self, options: Any, ours: Tensor, theirs: Tensor | None, answers: Answers
    ) -> tuple[Tensor, ...]:
        """The parts, each as its terms. ours: of looked-at positions the log-probability of the next token
        [r], differentiable; theirs: the same of the teacher."""
        raise AssertionError(f"{type(self).__name__} has no pairs")


def rewards(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, ...]:
    """What trl logs of rewards [pairs]: chosen, rejected, accuracies, margins."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return chosen, rejected, (chosen > rejected).double(), chosen - rejected


REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
LOG_PROBS = ("logps/chosen", "logps/rejected")
