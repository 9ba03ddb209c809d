"""A task as it is asked: the prompt with its slots, around what the model writes and what it answers.

    Classify {topic}: {input}    ->    head tokens | input | between tokens | answer | end

`{input}` is where the model writes, `{answer}` where it answers, every other name a slot that is filled from
a list. With a chat template the prompt is a user's turn and the answer the assistant's, so that `{answer}` is
left out; without one it stands at the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from ..chat import ChatTemplate
from ..errors import BadRow, DataError
from .voice import Voice

INPUT, ANSWER = "input", "answer"
_MARKER = "Zq7WhatIsWrittenQz"


@dataclass(frozen=True)
class Asked:
    """A prompt with its slots filled. head: tokens before the input; between: those from behind it to where
    the answer begins; words: the prompt around the input, for people."""

    head: tuple[int, ...]
    between: tuple[int, ...]
    words: tuple[str, str]


def fields_of(prompt: str) -> list[str]:
    """The names in a prompt, in their order. ValueError for one that is no template."""
    found = []
    for _, name, spec, conversion in Formatter().parse(prompt):
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"got {{{name}}}; a slot is a name in braces (a brace itself is {{{{ or }}}})")
        found.append(name)
    return found


def wrong_prompt(prompt: str, slots: Mapping[str, Any], chat: bool, says_answer: bool = False) -> str | None:
    """What is wrong with a prompt, and the way out. says_answer: it has to name the answer that is wanted."""
    try:
        names = fields_of(prompt)
    except ValueError as error:
        return str(error)
    if names.count(INPUT) != 1:
        return f"has {{input}} {names.count(INPUT)} times; the model writes at one place: name it once"
    known = {INPUT, ANSWER, *slots}
    if unknown := [name for name in names if name not in known]:
        return f"names {{{unknown[0]}}}, which is in no slot; add slots: {{{unknown[0]}: [...]}}"
    if says_answer:
        before = names[: names.index(INPUT)]
        return None if ANSWER in before else "has no {answer} before {input}; name what is to be written for"
    if chat and ANSWER in names:
        return "has {answer}; in a chat it is the assistant's turn: remove it, or set chat: false"
    if not chat and (names.count(ANSWER) != 1 or not prompt.endswith("{answer}")):
        return "must end with {answer}, where the model answers (chat: false)"
    if not chat and prompt.endswith("{input}{answer}"):
        return "has nothing between {input} and {answer}, so nothing tells them apart; put a word between"
    return None


class Schema:
    """Prompts as tokens, for a voice. ends: tokens that end an input or an answer; end: the one that stands
    behind an answer. ValueError where the chat template cannot say them."""

    def __init__(self, voice: Voice, chat: bool):
        self.voice, self.template = voice, None
        if not chat:
            if not (own := sorted(voice.stops)):
                raise ValueError(
                    "data.synthesis.chat: got false, and the model has no token that ends a text, so an "
                    "answer would not end; set eos_token_id in its generation_config.json"
                )
            eos = voice.tokenizer.eos_token_id
            self.end, self.ends = (own[0] if eos is None else eos), voice.stops
            return
        try:
            self.template = ChatTemplate(voice.tokenizer)
            ending = self.template.ending()[:1]
        except (BadRow, DataError) as error:
            raise ValueError(f"data.synthesis.chat: got true, but {error}; or set chat: false") from error
        if not ending:
            raise ValueError(
                "data.synthesis.chat: got true, but the chat template ends an answer with no token of its "
                "own, so nothing tells when it is over; set chat: false"
            )
        self.end, self.ends = ending[0], voice.stops | frozenset(ending)

    def asked(self, prompt: str, fill: Mapping[str, str]) -> Asked:
        """A prompt, its slots filled."""
        before, _, after = prompt.format(**{ANSWER: "", **fill, INPUT: _MARKER}).partition(_MARKER)
        if self.template is None:
            head = [*self.voice.before, *self.voice.encode(before)]
            return Asked(tuple(head), tuple(self.voice.encode(after)), (before, after))
        turn = [{"role": "user", "content": before + _MARKER + after}]
        try:
            opening, found, closing = self.template.render(turn, prompt=True).partition(_MARKER)
        except BadRow as error:
            raise ValueError(f"data.synthesis.chat: got true, but {error}; set chat: false") from error
        head, between = self.voice.encode(opening), self.voice.encode(closing)
        if not found or not head or not between:
            raise ValueError(
                "data.synthesis.chat: got true, but the chat template leaves out what the user says or what "
                "stands around it; set chat: false"
            )
        return Asked(tuple(head), tuple(between), (before, after))

    def answer(self, text: str) -> list[int]:
        """The tokens of an answer, with the one that ends it."""
        return [*self.voice.encode(text), self.end]

    def row(self, asked: Asked, written: Sequence[int], answer: Sequence[int]) -> list[int]:
        return [*asked.head, *written, *asked.between, *answer]
