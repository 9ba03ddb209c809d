"""train.teacher: a folder or hub id. Another model with the same tokens (or image processor), packed to 8
bits, forward beside the student.

With the path of the run's own model it is full precision at 8 bits, whatever start the student's codes had.
It is packed by the same code as the base, to rows of absmax, held frozen, and never written: made again, it
is the same bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.attention import block_diagonal_mask, segment_attention, segment_inputs, why_not
from ..model.config import read_config
from ..model.heads import Answering, find_head
from ..model.images import alike, read_processor
from ..model.tokenizer import read_tokenizer
from ..model.upload import upload
from ..names import HUB_ID
from .base import Answers, Ask, Costs, Making, Teacher, Walked, Whole


def unlike(theirs: Path, ours: Path, reads: str = "text") -> str | None:
    """Why the model in one folder cannot teach that in another: it is quantized, or what it reads (text or
    images, as of Task.reads) is not the same; None when it can. Reads config.json, tokenizers and image
    processors."""
    if read_config(theirs).get("quantization_config"):
        return "it is quantized already; give the dense checkpoint that it was made of"
    return (_other_images if reads == "images" else _other_tokens)(theirs, ours)


def _other_tokens(theirs: Path, ours: Path) -> str | None:
    mine, other = read_tokenizer(ours).get_vocab(), read_tokenizer(theirs).get_vocab()
    if mine == other:
        return None
    odd = sorted(token for token in {*mine, *other} if mine.get(token) != other.get(token))
    return (
        f"its tokens are others ({len(other)} against {len(mine)}; {len(odd)} differ, such as {odd[0]!r}: "
        f"{other.get(odd[0])} there, {mine.get(odd[0])} here), so its probabilities are of other things; "
        "give a model of the same family"
    )


def _other_images(theirs: Path, ours: Path) -> str | None:
    mine, other = read_processor(ours), read_processor(theirs)
    if alike(mine, other):
        return None
    return (
        "its image processor makes other numbers of a picture (size, or mean and deviation in "
        "preprocessor_config.json), and it would be shown those that the model's makes; give a model of the "
        "same family"
    )


class OtherModel(Teacher):
    def __init__(self, model: Any, facts: dict[str, Any]) -> None:
        super().__init__(facts)
        self.other: Any = model.eval().requires_grad_(False)
        self.answering: Answering | None = None

    @classmethod
    def problems(cls, recipe: Any, name: str) -> list[str]:
        folder, ours = Path(name).expanduser(), Path(recipe.model.path).expanduser()
        if not folder.is_dir():
            return [] if HUB_ID.fullmatch(name) else ["there is no such folder, and no hub id looks like it"]
        try:
            reason = unlike(folder, ours, recipe.task.reads) if ours.is_dir() else None
        except (OSError, ValueError) as error:
            return [str(error)]
        return [reason] if reason else []

    @classmethod
    def costs(cls, recipe: Any, name: str, weights: int, beside: int, vocabulary: int) -> Costs:
        note = "taken to be of the size of the student, packed to 8 bits"
        return Costs(held=weights + beside, forwards=1.0, note=note)

    @classmethod
    def make(cls, making: Making, name: str) -> OtherModel:
        model, facts = making.pack(name)
        return cls(model, {"teacher": "checkpoint", **facts})

    def model(self) -> tuple[nn.Module, AbstractContextManager[None]]:
        return self.other, nullcontext()

    @contextmanager
    def begin(self, student: Answering) -> Iterator[None]:
        with ExitStack() as stack:
            if student.whole:
                self.apart, self.answering = False, Answering(self.other.forward, None, whole=True)
            else:
                self.apart = not why_not(self.other)  # it attends by segments; else it is given a mask
                stack.enter_context(segment_attention(self.other))
                self.answering = Answering(self.other.forward, *find_head(self.other))
            try:
                yield
            finally:
                self.answering = None

    def walked(self) -> Walked:
        assert self.answering is not None, "begin() first"
        return Walked(self.other, self.answering, self._inputs, nullcontext)

    def _inputs(self, ask: Ask) -> dict[str, Any]:
        """What the other model is called with."""
        if self.answering is not None and self.answering.whole:
            return ask.inputs
        inputs = {name: ask.inputs[name] for name in ("input_ids", "position_ids") if name in ask.inputs}
        positions = ask.batch.get("position_ids")
        if positions is not None and self.apart:
            inputs |= {
                name: upload(value, ask.device) if isinstance(value, Tensor) else value
                for name, value in segment_inputs(self.other, positions).items()
            }
        elif positions is not None:
            inputs["attention_mask"] = block_diagonal_mask(inputs["position_ids"], self.other.dtype)
        return inputs

    def answers(self, ask: Ask) -> Answers:
        answering = self.answering
        assert answering is not None, "begin() first"
        with torch.no_grad():
            read = answering.read(self._inputs(ask))

        def answer(places: Tensor) -> Whole:
            with torch.no_grad():
                return Whole(read(places))

        return answer
