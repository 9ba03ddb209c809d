"""train.teacher: residual. The model before rounding, from the codes and residual of the packed base: one
more forward, and no second copy in memory.

It is the student itself, run without adapters and rounding (model/unrounded.py) in eval mode, before its own
forward in every micro-batch. What it cannot see is what the start gave away before it rounded: what was
clipped, and with gptq and its like, whose residual is that of the compensated weights, most of what there is
to learn. So its KL to full precision is measured before training, on the run's first windows, and it has to
be `nearest` times smaller than the student's own at step 0. Measured (tiny Llama, KL to full precision of
student and of this teacher): W4 0.0243 and 0.0007, W3 0.0883 and 0.0042, W2 0.438 and 0.024 from mse, 18 to
35 times; from gptq the student is the nearer one. There is nothing between, and 4 is below all that helped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..grid.calibrate import CALIBRATORS
from ..model.heads import Answering, resting
from ..model.unrounded import unrounded
from .base import Answers, Ask, Costs, Making, Teacher, Walked, Whole


class Residual(Teacher):
    nearest = 4.0
    instead = (
        "set train.teacher: cached (the full-precision model's own answers), train.signal.kind: labels, "
        "or quant.calibrate: mse, whose residual is that of the original weight"
    )

    def __init__(self, student: nn.Module) -> None:
        super().__init__({"teacher": "residual"})
        self.student = student
        self.answering: Answering | None = None

    @classmethod
    def problems(cls, recipe: Any, name: str) -> list[str]:
        quant = getattr(recipe, "quant", None)
        if quant is None:
            return []
        if quant.from_checkpoint:
            return [
                "the checkpoint comes quantized, without a residual; set train.teacher to the folder or hub "
                "id of the dense model, or train.signal.kind: labels"
            ]
        grid = quant.grid_for("")
        if not getattr(grid, "residual_bits", 0) and grid.bits < 8:
            return [
                "this base keeps no residual; set quant.residual_bits: 4 on an integer grid, "
                "train.teacher: cached, or train.signal.kind: labels"
            ]
        calibrator = CALIBRATORS.get(quant.calibrate)
        if calibrator is not None and calibrator.exact:
            return [
                f"quant.calibrate: {quant.calibrate} rounds nothing, so the base is all there is: no "
                f"teacher; {cls.instead}"
            ]
        if calibrator is not None and calibrator.needs_text:
            return [
                f"quant.calibrate: {quant.calibrate} moves the weights before it rounds them, and the "
                f"residual is that of the moved ones: no teacher; {cls.instead}"
            ]
        return []

    @classmethod
    def costs(cls, recipe: Any, name: str, weights: int, beside: int, vocabulary: int) -> Costs:
        return Costs(forwards=1.0, note="the base and its residual, no second copy")

    @classmethod
    def make(cls, making: Making, name: str) -> Residual:
        with unrounded(making.model):  # refuses layers by name
            return cls(making.model)

    def model(self) -> tuple[nn.Module, AbstractContextManager[None]]:
        return self.student, self._at_work()

    @contextmanager
    def begin(self, student: Answering) -> Iterator[None]:
        self.answering = student
        try:
            yield
        finally:
            self.answering = None

    def walked(self) -> Walked:
        assert self.answering is not None, "begin() first"
        return Walked(self.student, self.answering, lambda ask: ask.inputs, _before_rounding)

    def answers(self, ask: Ask) -> Answers:
        answering = self.answering
        assert answering is not None, "begin() first"
        with torch.no_grad(), self._at_work():
            read = answering.read(ask.inputs)

        def answer(positions: Tensor) -> Whole:
            with torch.no_grad(), self._at_work():
                return Whole(read(positions))

        return answer

    def _at_work(self) -> AbstractContextManager[None]:
        return _before_rounding(self.student)


@contextmanager
def _before_rounding(part: nn.Module) -> Iterator[None]:
    """Inside, the student, or a layer of it, is the teacher."""
    with unrounded(part), resting(part):
        yield
