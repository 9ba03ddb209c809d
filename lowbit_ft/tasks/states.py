"""States: the goal of tasks of images: a model and its teacher are compared by what both say of a picture,
and by their hidden states.

    loss = sum over the parts of  weight x (sum over pictures of how far apart they are) / pictures
    hidden: the squared error of every state that the model gives, a mean over its numbers and over the states

A state has any shape: tokens [B, L, H] of what attends, maps [B, C, H, W] of what convolves; no layer is
walked, so both models' states are in memory at once. The labels' part is the model's own loss, over its
answers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.heads import Answering
from ..signals import Lesson
from ..signals.base import Signal
from .labelled import Answered

# of what transformers' models return: lists of states, or one
STATES = ("hidden_states", "encoder_hidden_states", "encoder_last_hidden_state", "decoder_hidden_states")


class States(Answered):
    def counts(self, lesson: Lesson, batch: dict[str, Tensor]) -> Tensor:
        pictures = torch.tensor(self.pace.count(batch))
        return torch.stack([self.task.count(batch) if n == "labels" else pictures for n in lesson.parts])

    def begun(self, lesson: Lesson, model: nn.Module, student: Answering) -> AbstractContextManager[None]:
        """The teacher alone: signals of layers would walk."""
        return Signal.begin(lesson.signal, lesson, model, student)

    def beside(self, lesson: Lesson) -> dict[str, Any]:
        return {"output_hidden_states": True} if "hidden" in lesson.parts else {}

    def sums(
        self, lesson: Lesson, ours: Any, theirs: Any, labels: dict[str, Any]
    ) -> dict[str, Callable[[], Tensor]]:
        return {
            **super().sums(lesson, ours, theirs, labels),
            "hidden": lambda: hidden_apart(states_of(ours), states_of(theirs)),
        }


def states_of(outputs: Any) -> list[Tensor]:
    """The hidden states that a model gave, each once."""
    found: list[Tensor] = []
    for name in STATES:
        value = getattr(outputs, name, None)
        some = [value] if isinstance(value, Tensor) else value or ()
        found += [one for one in some if not any(one is other for other in found)]
    return found


def hidden_apart(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Sum over the pictures of the mean over the states of the mean squared error: a scalar in fp32,
    differentiable in `ours`. ValueError where the states are not one to one.

    States of queries [B, Q, H] of which one model has more are compared over the last ones: those before are
    noisy copies of the right boxes, which detectors add while they train with labels."""
    shapes = [[tuple(one.shape[1:]) for one in states] for states in (ours, theirs)]
    found = [last(a, b) for a, b in zip(ours, theirs, strict=False)]
    fits = len(ours) == len(theirs) and all(a.shape == b.shape for a, b in zip(found, theirs, strict=True))
    if not ours or not fits:
        raise ValueError(
            f"train.teacher: its hidden states are {shapes[1]}, and the model's {shapes[0]}: "
            "train.signal.kind: layers compares them one by one; give a teacher of the same depth and width, "
            "or set kind: logits"
        )
    off = [(a.float() - b.float()).square().flatten(1).mean(1) for a, b in zip(found, theirs, strict=True)]
    return torch.stack(off).mean(0).sum()


def last(x: Tensor, like: Tensor) -> Tensor:
    """The last queries of x [..., Q, C], as many as `like` has."""
    count = like.shape[-2]
    return x if x.shape[-2] <= count or x.dim() != like.dim() else x[..., -count:, :]
