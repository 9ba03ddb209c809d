"""From a row to tokens and the mask of the tokens that are learned.

A mask is a set of character spans of the rendered text, carried over to tokens with the tokenizer's own
offsets. So no token is ever guessed and the text is tokenized once, whole, exactly as a server would tokenize
it.

The spans of a chat come from ../chat.py, that of a completion from the length of its prompt.

A token belongs to a span if it starts in it. A token that begins before the span is the prompt's, unless its
part before the span is only white space (SentencePiece glues the space before a word to it).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, ClassVar

from ..chat import Span
from ..errors import BadRow, DataError, MissingKey, kind

# Of the column in which `lowbit-ft encode` says whose codes the tokens of a row are (../codecs.py).
CODEC_TOLD = "which speech codec made the codes in it: not learned; rows of two are refused"


@dataclass(frozen=True)
class Tokens:
    """One row as tokens: input_ids [L] and, for each, whether it is learned. lost: what of the row is not in
    them; sizes: lengths of the sequences they are, where a row is several (None: one)."""

    input_ids: list[int]
    learned: list[bool]
    lost: tuple[str, ...] = ()
    sizes: tuple[int, ...] | None = None


class Format(ABC):
    """Turns the rows of one format into Tokens.

    train_on: assistant (every assistant turn; the completion), completion (as assistant, but only the last
    one) or all (every token). `notes` collects what the user should know about this tokenizer. Raises
    DataError for a tokenizer that cannot do the format; calling it raises BadRow.
    """

    columns: ClassVar[Mapping[str, str]]  # that are read: name -> what becomes of it, for docs/data.md
    # Columns of a row by which the format is recognised where nobody names it: any of these sets.
    told_by: ClassVar[tuple[tuple[str, ...], ...]] = ()
    needs_template: ClassVar[bool] = False  # the tokenizer's chat template
    joined: ClassVar[bool] = False  # with data.packing, rows are joined and cut instead of kept whole
    pairs: ClassVar[bool] = False  # a row is a chosen and a rejected sequence, for a signal of pairs
    alone: ClassVar[str | None] = None  # of pairs: the format that has the chosen ones as plain rows

    def __init__(self, train_on: str, tokenizer: Any):
        if train_on not in ("assistant", "completion", "all"):
            raise DataError(f"train_on {train_on!r}; allowed: assistant, completion, all")
        self.tokenizer, self.train_on, self.notes = tokenizer, train_on, []
        self._fast = bool(getattr(tokenizer, "is_fast", False))
        if not self.needs_template and tokenizer.eos_token_id is None:
            self.notes.append("the tokenizer has no EOS token: the model will not learn where a text ends")

    @abstractmethod
    def __call__(self, row: Mapping[str, Any]) -> Tokens:
        """One row. BadRow says which key is wrong and why."""

    @classmethod
    def check(cls, row: Mapping[str, Any]) -> None:
        """What can be said of a row without a tokenizer, for `plan`. BadRow."""
        if cls.told_by and not any(set(columns) <= row.keys() for columns in cls.told_by):
            raise MissingKey(repr(next(key for key in cls.told_by[0] if key not in row)), row)

    def reads(self, row: Mapping[str, Any]) -> Set[str]:
        """The columns that are read of this row; what else it has is counted as not read."""
        return self.columns.keys()

    def whole(self, text: str) -> Tokens:
        """Every token of a text is learned."""
        ids = self._with_eos(self.encode(text, special=True)[0])
        return Tokens(ids, [True] * len(ids))

    def prompted(self, prompt: str, completion: str, *, first: bool = True) -> Tokens:
        """A prompt, and the completion that is learned. first: nothing of the row stands before it, so the
        tokenizer's BOS does."""
        border, text = len(prompt), prompt + completion
        ids, offsets = self.encode(text, special=first)
        if offsets is None or any(s < border < e and prompt[s:].strip() for s, e in offsets):
            # A token would hold the end of the prompt and the start of the answer. No server can ask for it:
            # it tokenizes the prompt alone, so here the two are tokenized alone too.
            head, tail = self.encode(prompt, special=first)[0], self.encode(completion, special=False)[0]
            if len(head) > 1 and head[-1] == self.tokenizer.eos_token_id:  # added by the tokenizer
                head = head[:-1]
            ids, learned = head + tail, [False] * len(head) + [True] * len(tail)
        else:
            learned = _inside(text, [(border, len(text))], offsets)
        closed = self._with_eos(ids)
        learned = (learned + [True])[: len(closed)]
        if self.tokenizer.eos_token_id is not None:
            learned[-1] = True
        return Tokens(closed, [True] * len(closed) if self.train_on == "all" else learned)

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def encode(self, text: str, *, special: bool) -> tuple[list[int], list[Span] | None]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            what = (
                f"byte 0x{code - 0xDC00:02x} is not UTF-8" if 0xDC80 <= code <= 0xDCFF else "a lone surrogate"
            )
            raise BadRow(f"not valid Unicode: {what} at character {error.start + 1} of the text") from error
        # verbose=False: a text longer than the model's context is cut or packed later, no cause for a warning
        out = self.tokenizer(
            text,
            add_special_tokens=special,
            return_offsets_mapping=self._fast,
            verbose=False,
            truncation=False,
        )
        return list(out["input_ids"]), out["offset_mapping"] if self._fast else None

    def mark(self, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        ids, offsets = self.encode(text, special=False)
        if offsets is not None:
            return ids, _inside(text, spans, offsets)
        learned = [False] * len(ids)
        for start, end in spans:
            first, stop = self._count(text, start, ids), self._count(text, end, ids)
            learned[first:stop] = [True] * (stop - first)
        return ids, learned

    def _count(self, text: str, border: int, ids: list[int]) -> int:
        """How many tokens text[:border] is, for a tokenizer without offsets."""
        head = ids if border == len(text) else self.encode(text[:border], special=False)[0]
        if ids[: len(head)] != head:
            raise BadRow(
                "this tokenizer gives no character offsets and a token crosses the start or end of "
                "the answer, so the loss mask would not be exact; use a fast tokenizer (tokenizer.json)"
            )
        return len(head)


def _inside(text: str, spans: list[Span], offsets: list[Span]) -> list[bool]:
    """Which of the tokens with these character offsets belong to one of the spans: the rule at the file's
    head."""
    inside = [False] * len(offsets)
    for start, end in spans:
        for i, (s, e) in enumerate(offsets):
            if s == e:  # white space whose offsets were trimmed away (ByteLevel), or an added BOS at 0
                inside[i] |= start < e <= end
            elif s >= start:
                inside[i] |= s < end
            elif e > start:
                inside[i] |= not text[s:start].strip() and bool(text[start:e].strip())
    return inside


def string(row: Mapping[str, Any], key: str, *, filled: bool = False) -> str:
    if key not in row:
        raise MissingKey(repr(key), row)
    value = row[key]
    if not isinstance(value, str):
        raise BadRow(f"{key!r} must be a string; got {kind(value)}")
    if filled and not value.strip():
        raise BadRow(f"{key!r} is empty")
    return value
