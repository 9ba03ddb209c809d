"""train.teacher: <folder or hub id>. Another model with the same tokens, packed to 8 bits, forward beside the
student.

With the path of the run's own model it is full precision at 8 bits, whatever start the student's codes had.
It is packed by the same code as the base, to rows of absmax, held frozen, and never written: made again, it
is the same bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..model.attention import block_diagonal_mask, segment_attention, segment_inputs, why_not
from ..model.heads import Answering, find_head
from .base import Answers, Ask, Costs, Making, Teacher, Whole


class OtherModel(Teacher):
    instead = "set train.teacher to a model that is nearer, or signal.kind: labels"

    def __init__(self, model: Any, facts: dict[str, Any]) -> None:
        super().__init__(facts)
        self.other: Any = model.eval().requires_grad_(False)
        self.answering: Answering | None = None

    @classmethod
    def costs(cls, recipe: Any, name: str, weights: int, packed: int) -> Costs:
        return Costs(held=weights, forwards=1.0, note="taken to be of the student's size, packed to 8 bits")

    @classmethod
    def make(cls, making: Making, name: str) -> OtherModel:
        model, facts = making.pack(name)
        return cls(model, {"teacher": "checkpoint", **facts})

    def model(self) -> tuple[nn.Module, AbstractContextManager[None]]:
        return self.other, nullcontext()

    @contextmanager
    def begin(self, student: Answering) -> Iterator[None]:
        with ExitStack() as stack:
            self.apart = not why_not(self.other)  # it attends by segments; else it is given a mask
            stack.enter_context(segment_attention(self.other))
            self.answering = Answering(self.other.forward, *find_head(self.other))
            try:
                yield
            finally:
                self.answering = None

    def answers(self, ask: Ask) -> Answers:
        answering = self.answering
        assert answering is not None, "begin() first"
        inputs = {name: ask.inputs[name] for name in ("input_ids", "position_ids") if name in ask.inputs}
        positions = ask.batch.get("position_ids")
        if positions is not None and self.apart:
            inputs |= {
                name: value.to(ask.device) if isinstance(value, Tensor) else value
                for name, value in segment_inputs(self.other, positions).items()
            }
        elif positions is not None:
            inputs["attention_mask"] = block_diagonal_mask(inputs["position_ids"], self.other.dtype)
        with torch.no_grad():
            read = answering.read(inputs)

        def answer(places: Tensor) -> Whole:
            with torch.no_grad():
                return Whole(read(places))

        return answer
