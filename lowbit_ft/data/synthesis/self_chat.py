"""kind: self_chat. Chats of which a chat model writes both sides: a question, from the head of its template,
and then the answer to it.

Magpie (arXiv 2406.08464): a model that was tuned on chats has seen the words of users behind the head of the
user's turn, so it writes some there; what follows is put by the template, and the answer is drawn. There is
no prompt and no question to start from, so nothing is greedy.

Questions have different lengths. All rows of a batch are still at one position at every step, because the
template's part between question and answer is fed one token after the other, like what is written: no
padding, no mask.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..chat import ChatTemplate
from ..errors import BadRow
from .text import TextConfig
from .voice import Row, Rows, Voice

_MARKER = "Zq7WordsOfTheUserQz"


class SelfChatConfig(TextConfig):
    kind: Literal["self_chat"] = "self_chat"
    system: str | None = Field(
        default=None, min_length=1, description="a system turn before each chat; null: what the template has"
    )

    @property
    def needs_template(self) -> bool:
        return True

    def problem(self, max_len: int) -> tuple[str, str] | None:
        if self.samples is not None:
            return None
        return "samples", "got null; chats have no starts that could be counted; give a number"

    def rows(self, voice: Voice) -> Rows:
        return Chats(self, voice)


class Chats(Rows):
    """head: the template up to the user's words; between: from behind them to where the assistant speaks."""

    def __init__(self, config: SelfChatConfig, voice: Voice):
        template = ChatTemplate(voice.tokenizer)
        self.system = [{"role": "system", "content": config.system}] if config.system else []
        asked = [*self.system, {"role": "user", "content": _MARKER}]
        try:
            head, found, between = template.render(asked, prompt=True).partition(_MARKER)
        except BadRow as error:
            raise ValueError(
                f"data.synthesis.kind: got self_chat, but {error}; set kind: self_generated"
            ) from error
        self.head, self.between = voice.encode(head), voice.encode(between)
        if not found or not self.head or not self.between or self.between[0] not in voice.special:
            raise ValueError(
                "data.synthesis.kind: got self_chat, but the chat template ends a user's turn with no token "
                f"of its own ({between[:40]!r} stands behind it), so nothing tells when the question is "
                "over; set kind: self_generated"
            )
        self.ends = voice.stops | frozenset(template.ending()[:1])
        self.drawable = self.ends | {self.between[0]}
        self.count = config.samples or 0
        self.notes = [f"{len(self.head)} tokens of the chat template before each question"]
        self.voice = voice
        if len(self.head) + len(self.between) + 2 > voice.max_len:
            raise ValueError(
                f"data.synthesis.max_len: got {voice.max_len}; the chat template alone has "
                f"{len(self.head) + len(self.between)} tokens; raise it"
            )

    def __getitem__(self, number: int) -> Row:
        return Chat(self)


class Chat(Row):
    """asked: where the question ends; answered: where the answer begins; 0 before that."""

    def __init__(self, rows: Chats):
        super().__init__(rows.head)
        self.rows, self.asked, self.answered = rows, 0, 0

    def take(self, likeliest: int, drawn: int) -> bool:
        rows, ids = self.rows, self.ids
        if self.asked and not self.answered:
            ids.append(rows.between[len(ids) - self.asked])
            self.answered = len(ids) if len(ids) - self.asked == len(rows.between) else 0
        elif not self.asked and drawn in (rows.between[0], *rows.ends):
            self.asked = len(ids)  # the template's own end of turn stands there, whichever was drawn
            ids.append(rows.between[0])
            self.answered = len(ids) if len(rows.between) == 1 else 0
        else:
            ids.append(drawn)
        ended = bool(self.answered) and len(ids) > self.answered and ids[-1] in rows.ends
        return not ended and len(ids) < rows.voice.max_len

    def wrote(self) -> list[list[int]]:
        if not self.answered:
            return [self.ids[len(self.rows.head) :], []]  # a question without end
        answer = self.ids[self.answered :]
        answer = answer[:-1] if answer and answer[-1] in self.rows.ends else answer
        return [self.ids[len(self.rows.head) : self.asked], answer]

    def facts(self) -> dict[str, Any]:
        question, answer = (self.rows.voice.text(part) for part in self.wrote())
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        start = self.answered or len(self.ids)
        return {"learned": [[start, len(self.ids)]], "messages": [*self.rows.system, *turns]}
