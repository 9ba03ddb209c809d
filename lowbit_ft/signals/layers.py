"""layers: the teacher's logits, and what every layer of it makes (TernaryBERT, arXiv 2009.12812; Teacher
Intervention, arXiv 2302.11812).

    logits    T^2 KL(teacher, student), at the answers              (of a number: the squared error)
    labels    the loss of the rows' own answers; left out unless it is asked for
    hidden    the output of every layer, squared error
    scores    q k^T / sqrt(d) of every layer, before mask and softmax, squared error over what is visible
    outputs   the output of every layer's attention, squared error

Those of layers are means over the numbers of a token and over the layers (the papers sum the layers, and
count padding), so that a weight means the same in models of any depth; they are summed over the tokens that
are no padding. A task of images takes the hidden states that its model gives, and sums over pictures
(tasks/states.py). The embedding is frozen, so its part of the papers' loss is a constant, and left out. With
an intervention (intervention.py) the losses are taken behind what is the teacher's, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from ..model.heads import Answering
from ..model.maps import map_attention
from .base import Given, Lesson, Part, Signal
from .intervention import MODES
from .lockstep import Lockstep
from .logits import compared
from .tokens import token_loss

OF_LAYERS = ("hidden", "scores", "outputs")


class Layers(Signal):
    of_layers: ClassVar[bool] = True
    language: ClassVar[bool] = False
    keys = frozenset({"losses", "intervention", "temperature", "divergence", "on"})

    def parts(self, options: Any) -> dict[str, Part]:
        weights = options.weights
        labels = {"labels": Part(weights["labels"])} if weights["labels"] else {}
        layers = {name: Part(weights[name], "all") for name in OF_LAYERS if weights[name]}
        return {**labels, "logits": Part(weights["logits"], options.on), **layers}

    def sums(
        self, options: Any, logits: Tensor, tokens: Tensor, counted: Tensor, given: Given | None
    ) -> tuple[Tensor, ...]:
        """Of labels and logits; those of the layers are the lockstep's."""
        labels = (token_loss(logits, tokens),) if options.weights["labels"] else ()
        return (*labels, compared(options, logits, tokens, counted, given))

    def reads_maps(self, options: Any) -> bool:
        places = () if options.intervention is None else MODES[options.intervention.mode].places
        return bool(options.weights["scores"]) or "map" in places

    @contextmanager
    def begin(self, lesson: Lesson, model: nn.Module, student: Answering) -> Iterator[None]:
        assert lesson.teacher is not None
        with ExitStack() as stack:
            stack.enter_context(lesson.teacher.begin(student))
            walked = lesson.teacher.walked()
            assert walked is not None, "refused by the recipe"
            if self.reads_maps(lesson.options) and walked.model is not model:
                stack.enter_context(map_attention(walked.model))
            wanted = tuple(name for name in OF_LAYERS if name in lesson.parts)
            lesson.lockstep = Lockstep(model, walked, lesson.options, wanted)
            stack.enter_context(lesson.lockstep.attached())
            try:
                yield
            finally:
                lesson.lockstep = None
