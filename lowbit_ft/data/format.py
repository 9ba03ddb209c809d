"""From a row to tokens and the mask of the tokens that are learned.

A mask is a set of character spans of the rendered text, carried over to tokens with the tokenizer's own
offsets. So no token is ever guessed and the text is tokenized once, whole, exactly as a server would tokenize
it.

The spans of a chat come from chat.py, that of a completion from the length of its prompt.

A token belongs to a span if it starts in it. A token that begins before the span is the prompt's, unless its
part before the span is only white space (SentencePiece glues the space before a word to it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .audit import not_written
from .chat import ChatTemplate, Span
from .columns import COLUMNS
from .errors import BadRow, DataError, kind
from .messages import Chat, read_chat

# The prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, README), which tuned models expect.
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request."
)
_ALPACA = "### Instruction:\n{instruction}\n\n{input}### Response:\n"


@dataclass(frozen=True)
class Tokens:
    """One row as tokens: input_ids [L] and, for each, whether it is learned. lost: what of the row is not in
    them."""

    input_ids: list[int]
    learned: list[bool]
    lost: tuple[str, ...] = ()


class Formatter:
    """Turns rows of one format into Tokens.

    format: chat | completion | alpaca | text.  train_on: assistant (every assistant turn; the completion),
    completion (as assistant, but only the last one) or all (every token). Text always learns every token. A
    turn of a chat that says of itself that it is learned or not is believed, except that completion never
    learns an earlier turn. `notes` collects what the user should know about this tokenizer. Raises DataError
    for a tokenizer that cannot do the format; calling it raises BadRow.
    """

    def __init__(self, format: str, train_on: str, tokenizer: Any):
        formats: dict[str, Callable[[Mapping[str, Any]], Tokens]] = {
            "chat": self._chat,
            "completion": self._completion,
            "alpaca": self._alpaca,
            "text": self._text,
        }
        assert formats.keys() == COLUMNS.keys()
        if format not in formats:
            raise DataError(f"data format {format!r}; allowed: {', '.join(formats)}")
        if train_on not in ("assistant", "completion", "all"):
            raise DataError(f"train_on {train_on!r}; allowed: assistant, completion, all")
        self.tokenizer, self.train_on, self.notes = tokenizer, train_on, []
        self._format = formats[format]
        self._fast = bool(getattr(tokenizer, "is_fast", False))
        self._template = ChatTemplate(tokenizer) if format == "chat" else None
        if self._template is not None and not self._template.closing.strip():
            self.notes.append(
                "the chat template writes no end-of-turn token after an assistant turn: "
                "the model will not learn to stop"
            )
        if self._template is None and tokenizer.eos_token_id is None:
            self.notes.append("the tokenizer has no EOS token: the model will not learn where a text ends")

    def __call__(self, row: Mapping[str, Any]) -> Tokens:
        return self._format(row)

    # formats

    def _text(self, row: Mapping[str, Any]) -> Tokens:
        text = _string(row, "text", filled=True)
        ids = self._with_eos(self._encode(text, special=True)[0])
        return Tokens(ids, [True] * len(ids))

    def _completion(self, row: Mapping[str, Any]) -> Tokens:
        return self._prompted(_string(row, "prompt"), _string(row, "completion", filled=True))

    def _alpaca(self, row: Mapping[str, Any]) -> Tokens:
        instruction, output = _string(row, "instruction", filled=True), _string(row, "output", filled=True)
        context = _string(row, "input") if row.get("input") is not None else ""
        paired = ", paired with an input that provides further context" if context else ""
        system = (_string(row, "system") if row.get("system") is not None else "").strip()
        opening = (system or _ALPACA_SYSTEM.format(paired=paired)) + "\n\n"
        block = f"### Input:\n{context}\n\n" if context else ""
        prompt = _ALPACA.format(instruction=instruction, input=block)
        history = _history(row)
        if not history:
            return self._prompted(opening + prompt, output)
        turns = [(_ALPACA.format(instruction=asked, input=""), answer) for asked, answer in history]
        ids, learned = list[int](), list[bool]()
        for i, (asked, answer) in enumerate([*turns, (prompt, output)]):
            # Each prompt and answer is tokenized alone, as a server continues a chat.
            turn = self._prompted((opening if i == 0 else "\n\n") + asked, answer, first=i == 0)
            ids += turn.input_ids
            only_last = self.train_on == "completion" and i < len(turns)
            learned += [False] * len(turn.learned) if only_last else turn.learned
        return Tokens(ids, learned)

    def _prompted(self, prompt: str, completion: str, *, first: bool = True) -> Tokens:
        border, text = len(prompt), prompt + completion
        ids, offsets = self._encode(text, special=first)
        if offsets is None or any(s < border < e and prompt[s:].strip() for s, e in offsets):
            # A token would hold the end of the prompt and the start of the answer. No server can ask for it:
            # it tokenizes the prompt alone, so here the two are tokenized alone too.
            head, tail = self._encode(prompt, special=first)[0], self._encode(completion, special=False)[0]
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

    def _chat(self, row: Mapping[str, Any]) -> Tokens:
        template = self._template
        assert template is not None
        chat = read_chat(row)
        turns = self._turns(chat)
        messages, tools = template.formed(chat.messages), chat.tools
        text = template.render(messages, tools)
        if self.train_on == "all":
            out = [i for i, flag in enumerate(chat.learn) if flag is False]
            masked = template.spans(messages, tools, text, out, chat.places, whole=True)
            lost = not_written(chat, messages, text, dict.fromkeys(turns, text), template)
            ids, hidden = self._mark(text, [span for spans in masked.values() for span in spans])
            return Tokens(ids, [not h for h in hidden], tuple(lost))
        try:
            found = template.spans(messages, tools, text, turns, chat.places)
        except BadRow:
            try:
                not_written(chat, messages, text, dict.fromkeys(turns, text), template)
            except BadRow as cause:
                raise BadRow(f"{cause}; so the rendering cannot be split there") from None
            raise
        taught = {turn: " ".join(text[s:e] for s, e in spans) for turn, spans in found.items()}
        lost = not_written(chat, messages, text, taught, template)
        ids, learned = self._mark(text, [span for spans in found.values() for span in spans])
        if turns and not any(learned):
            raise BadRow("the chat template writes nothing for the assistant turns")
        return Tokens(ids, learned, tuple(lost))

    def _turns(self, chat: Chat) -> list[int]:
        """The turns that are learned for themselves: with train_on: all those of the assistant, whose words
        may not be lost."""
        answers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
        asked = self.train_on == "assistant" and True in chat.learn
        if self.train_on != "all" and not answers and not asked:
            roles = ", ".join(sorted({repr(m["role"][:40]) for m in chat.messages}))
            raise BadRow(f"no assistant turn to learn from; the roles are: {roles}")
        if self.train_on == "completion":
            return [i for i in answers[-1:] if chat.learn[i] is not False]
        return [i for i, f in enumerate(chat.learn) if f or (f is None and i in answers)]

    # tokens

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def _encode(self, text: str, *, special: bool) -> tuple[list[int], list[Span] | None]:
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

    def _mark(self, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        ids, offsets = self._encode(text, special=False)
        if offsets is not None:
            return ids, _inside(text, spans, offsets)
        learned = [False] * len(ids)
        for start, end in spans:
            first, stop = self._count(text, start, ids), self._count(text, end, ids)
            learned[first:stop] = [True] * (stop - first)
        return ids, learned

    def _count(self, text: str, border: int, ids: list[int]) -> int:
        """How many tokens text[:border] is, for a tokenizer without offsets."""
        head = ids if border == len(text) else self._encode(text[:border], special=False)[0]
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


def _history(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The earlier [instruction, output] pairs of an Alpaca row."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise BadRow("'history' must be a list of [instruction, output] pairs")
    for i, pair in enumerate(pairs):
        for part in pair:
            if not isinstance(part, str) or not part.strip():
                raise BadRow(f"history[{i}] must be two strings that are not empty")
    return [(asked, answer) for asked, answer in pairs]


def _string(row: Mapping[str, Any], key: str, *, filled: bool = False) -> str:
    if key not in row:
        keys = ", ".join(repr(k) for k in list(row)[:8]) or "none"
        raise BadRow(f"key {key!r} is missing; the row's keys are: {keys}")
    value = row[key]
    if not isinstance(value, str):
        raise BadRow(f"{key!r} must be a string; got {kind(value)}")
    if filled and not value.strip():
        raise BadRow(f"{key!r} is empty")
    return value
