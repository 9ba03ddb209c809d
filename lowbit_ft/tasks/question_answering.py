"""task: question_answering. The answer to a question is a span of a text.

Rows as SQuAD has them: {question, context, answers: {text: [...], answer_start: [...]}}, where answer_start
counts characters of the context. The head gives every token a logit of being the first of the answer and one
of being the last; the loss is the mean of their cross entropies.

A context that is too long is cut into pieces that overlap by `stride` tokens, each with the question before
it. Trained is every piece; in one that the answer does not lie in, first and last are the first special token
(CLS). A row is answered by the best span of all its pieces:

    score(i, j) = start_i + end_j      i <= j, j - i + 1 <= max_answer_length, both in the context

and, with `unanswerable`, by nothing where the smallest score of CLS in its pieces is above that by more than
`null_threshold`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..data.errors import BadRow, DataError, kind
from ..model.purpose import Purpose
from .labelled import Labelled
from .labels import UNKNOWN, label_values
from .rows import Encoded, Encoder, Rows, of_column, text_of
from .spans import best_span, of_spans

Count = Annotated[int, Field(ge=1)]


class QuestionAnswering(Labelled):
    pipeline: ClassVar[str] = "question-answering"
    auto: ClassVar[str] = "AutoModelForQuestionAnswering"
    peft: ClassVar[str | None] = "QUESTION_ANS"
    answers: ClassVar[tuple[str, ...]] = ("start_positions", "end_positions")
    unit: ClassVar[str] = "pieces of rows"

    taught: ClassVar[bool] = False

    kind: Literal["question_answering"] = "question_answering"
    question: str = Field(default="question", description="the column of the question")
    context: str = Field(default="context", description="the column of the text that holds the answer")
    answer: str = Field(
        default="answers", description="the column of {text: [...], answer_start: [...]}, in characters"
    )
    stride: Annotated[int, Field(ge=0)] = Field(
        default=128, description="tokens that two pieces of one context share"
    )
    max_answer_length: Count = Field(default=30, description="tokens of the longest answer that is given")
    n_best: Count = Field(default=20, description="starts and ends that an answer is looked for among")
    unanswerable: bool = Field(
        default=False, description="rows may have no answer (SQuAD 2.0), and the model may give none"
    )
    null_threshold: float = Field(
        default=0.0, description="with unanswerable: by how much no answer must be ahead of the best one"
    )

    def purpose(self, seed: int) -> Purpose:
        return Purpose(self.auto, label_values(UNKNOWN), seed)  # a head of two outputs

    def encoder(self, source: Any, section: Any, tokenizer: Any) -> Encoder:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "task: question_answering needs a fast tokenizer (tokenizer.json), which says which token is "
                "which part of the text"
            )
        numbers = itertools.count()

        def encode(row: Mapping[str, Any], _: Path) -> list[Encoded]:
            question, context = text_of(row, self.question).lstrip(), text_of(row, self.context)
            right, span = self._answers(row, context)
            facts = {"row": next(numbers), "context": context, "right": right}
            pieces = self._pieces(tokenizer, section.sequence_len, question, context)
            return [{**piece, **_place(piece, span), **facts} for piece in pieces]

        reads = frozenset([self.question, self.context, self.answer])
        return Encoder(encode, self._told, reads, filled=True)

    def _answers(self, row: Mapping[str, Any], context: str) -> tuple[list[str], tuple[int, int] | None]:
        """The right answers of a row, and the characters of the first one (None: there is none). BadRow."""
        given = of_column(row, self.answer)
        texts, starts = (
            (given.get(key) for key in ("text", "answer_start")) if isinstance(given, dict) else (0, 0)
        )
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise BadRow(
                f"{self.answer!r} must be {{'text': [...], 'answer_start': [...]}}, two lists of one length; "
                f"got {kind(given)}"
            )
        if not all(isinstance(text, str) for text in texts):
            raise BadRow(f"{self.answer!r}: 'text' must be a list of strings")
        if not texts:
            if self.unanswerable:
                return [], None
            raise BadRow("it has no answer; set task.unanswerable: true for rows as those of SQuAD 2.0")
        first, begin = texts[0], starts[0]
        if not isinstance(begin, int) or isinstance(begin, bool) or begin < 0:
            raise BadRow(
                f"{self.answer!r}: 'answer_start' must be a list of places in {self.context!r}, counted in "
                f"characters from 0; got {begin!r}"
            )
        if not first.strip() or context[begin : begin + len(first)] != first:
            found = context[begin : begin + len(first)]
            raise BadRow(f"the answer {first!r} is not at {begin} of {self.context!r}, where {found!r} is")
        # of the space around it there need not be a token
        return texts, (begin + len(first) - len(first.lstrip()), begin + len(first.rstrip()))

    def _pieces(self, tokenizer: Any, limit: int, question: str, context: str) -> list[Encoded]:
        """The question with each piece of the context. `offsets`: for every token of the context its first
        character and the one behind its last; None for other tokens. BadRow where no piece has room."""
        asked = tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
        room = limit - len(asked) - tokenizer.num_special_tokens_to_add(pair=True)
        if room <= self.stride:
            raise BadRow(
                f"its question leaves {max(0, room)} of {limit} tokens for a piece of the context, and two "
                f"pieces share {self.stride}; raise data.sequence_len, or lower task.stride"
            )
        made = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=limit,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        names = [name for name in made if name not in ("overflow_to_sample_mapping", "offset_mapping")]
        found = []
        for number, offsets in enumerate(made["offset_mapping"]):
            of_context = [part == 1 for part in made.sequence_ids(number)]
            piece: Encoded = {name: made[name][number] for name in names}
            piece["offsets"] = [
                list(place) if inside else None for place, inside in zip(offsets, of_context, strict=True)
            ]
            ids, cls = piece["input_ids"], tokenizer.cls_token_id
            piece["cls"] = ids.index(cls) if cls in ids else 0
            found.append(piece)
        return found

    def _told(self, made: Encoded) -> Iterable[str]:
        if not made["right"]:
            return ["none"]
        return ["in its piece" if made["start_positions"] != made["cls"] else "in another piece"]

    def loss(self, outputs: Any, labels: dict[str, Tensor]) -> Tensor:
        start = F.cross_entropy(outputs.start_logits.float(), labels["start_positions"], reduction="sum")
        end = F.cross_entropy(outputs.end_logits.float(), labels["end_positions"], reduction="sum")
        return (start + end) / 2

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(len(batch["start_positions"]))

    def blank(self, windows: int, length: int) -> dict[str, Tensor]:
        return {name: torch.empty(windows, dtype=torch.int64) for name in self.answers}

    def said(
        self, outputs: Any, labels: dict[str, Tensor], rows: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Of each piece (its row, right answers), and (score of the best span, its text, score of none)."""
        starts, ends = outputs.start_logits.float().cpu(), outputs.end_logits.float().cpu()
        true, said = [], []
        for piece, start, end in zip(rows, starts, ends, strict=True):
            offsets, cls = piece["offsets"], piece["cls"]
            outside = torch.tensor([place is None for place in offsets])
            begins, stops = (x[: len(offsets)].masked_fill(outside, float("-inf")) for x in (start, end))
            best = best_span(begins, stops, self.n_best, self.max_answer_length)
            none, text, score = float(start[cls] + end[cls]), "", float("-inf")
            if best is not None:
                score, first, last = best
                text = piece["context"][offsets[first][0] : offsets[last][1]]
            true.append((piece["row"], piece["right"]))
            said.append((score, text, none))
        return true, said

    def score(self, true: list[Any], said: list[Any]) -> dict[str, float]:
        right: dict[int, list[str]] = {}
        best: dict[int, tuple[float, str, float]] = {}
        for (row, answers), (score, text, none) in zip(true, said, strict=True):
            before = best.get(row, (float("-inf"), "", float("inf")))
            right[row] = answers
            best[row] = (*max(before[:2], (score, text), key=lambda one: one[0]), min(before[2], none))
        given = [
            "" if self.unanswerable and none - score > self.null_threshold else text
            for score, text, none in best.values()
        ]
        return of_spans(list(right.values()), given)

    def first(self, examples: Any, count: int | None) -> Any:
        """All pieces of the first `count` rows."""
        pieces = examples[:]
        kept = set(list(dict.fromkeys(piece["row"] for piece in pieces))[:count])
        return Rows((piece for piece in pieces if piece["row"] in kept), examples.report).by_length()


def _place(piece: Encoded, span: tuple[int, int] | None) -> dict[str, int]:
    """The first and the last token that have a part of the answer, in a piece; CLS where it does not lie in
    it whole. Of a character that is several tokens (bytes) each says all of it: its first and its last."""
    places = [(i, *place) for i, place in enumerate(piece["offsets"]) if place is not None]
    inside = [i for i, begin, stop in places if span is not None and begin < span[1] and stop > span[0]]
    if span is None or not inside or places[0][1] > span[0] or places[-1][2] < span[1]:
        return {"start_positions": piece["cls"], "end_positions": piece["cls"]}
    return {"start_positions": inside[0], "end_positions": inside[-1]}
