"""What of a chat its template did not write.

A template is a program and may drop anything: thoughts, calls, a role it does not know, the tools. Here every
piece of a chat is looked for in the rendering: what a learned turn teaches within that turn's own span, all
else anywhere. White space may differ, and text may be written as JSON or as Python writes it. A piece so
short that it may stand elsewhere by chance is asked for instead: does another word in its place come out?

A learned turn that lost something is refused, since the model would learn to leave it out. The rest is
counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .chat import ChatTemplate
from .columns import THOUGHT_KEYS
from .errors import BadRow
from .messages import Conversation

SHORT = 12  # characters below which a piece found in the text may be another's

# Keys of a turn that say how turns belong together, not what was said.
_WIRING = frozenset({"role", "content", "tool_calls", "name", "id", "tool_call_id", "type", *THOUGHT_KEYS})
_THOUGHTS = "thoughts"


class _Text:
    """A text that pieces are looked for in."""

    def __init__(self, text: str):
        self.text = text
        self._bare: str | None = None

    def holds(self, piece: str) -> bool:
        piece = piece.strip()
        if piece in self.text:
            return True
        if self._bare is None:
            self._bare = "".join(self.text.split())
        written = (
            piece,
            json.dumps(piece, ensure_ascii=False)[1:-1],
            json.dumps(piece)[1:-1],
            repr(piece)[1:-1],
        )
        return any("".join(form.split()) in self._bare for form in written)


def not_written(
    chat: Conversation,
    messages: list[dict[str, Any]],
    text: str,
    learned: Mapping[int, str],
    template: ChatTemplate,
) -> list[str]:
    """Names of what of `chat` is not in `text`, its rendering, each once ("tools", "system content").
    `messages`: the chat's, as the template was given them; learned: turn -> the text of it that is learned.
    BadRow: a learned turn lost a piece of what it teaches."""
    whole, lost = _Text(text), dict[str, None]()
    for i, message in enumerate(chat.messages):
        place = _Text(learned[i]) if i in learned else whole
        for what, piece in _pieces(message):
            if not piece.strip():
                continue
            found = (place if what in _TAUGHT else whole).holds(piece)
            if found and i not in learned and what == "content" and len(piece.strip()) < SHORT:
                found = template.writes(messages, chat.tools, i)
            if found:
                continue
            if i in learned and what in _TAUGHT:
                raise BadRow(_refusal(chat.places[i], what))
            lost[f"{message['role']} {what}"] = None
        for key, value in message.items():
            if key not in _WIRING and isinstance(value, str) and value.strip() and not whole.holds(value):
                lost[f"{message['role']} {key}"] = None
    if any(not whole.holds(piece) for tool in chat.tools or [] for piece in _said_of(tool)):
        lost["tools"] = None
    return list(lost)


_TAUGHT = frozenset({"content", "tool_calls", _THOUGHTS, *THOUGHT_KEYS})


def _refusal(place: str, what: str) -> str:
    thoughts = what == _THOUGHTS or what in THOUGHT_KEYS
    way_out = (
        "where it drops those of earlier turns only, data.train_on: completion or weight 0 on these turns"
        if thoughts
        else "weight 0 on the turn"
    )
    return (
        f"{place}: the chat template does not write the {what} of this turn, which would be learned without; "
        f"use a chat template that writes all of a turn, or {way_out}"
    )


def _pieces(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what it is, text) of all that a turn says."""
    content = message.get("content") or ""
    thoughts, closed, answer = content.rpartition("</think>")
    if message["role"] == "assistant" and closed:
        yield from ((_THOUGHTS, part) for part in re.split(r"</?think>", thoughts))
        content = answer
    yield "content", content
    for key in THOUGHT_KEYS:
        if isinstance(message.get(key), str):
            yield key, message[key]
    for call in message.get("tool_calls", ()):
        inner = call.get("function")
        inner = inner if isinstance(inner, dict) else call
        yield from (("tool_calls", leaf) for leaf in [inner["name"], *_leaves(inner.get("arguments"))])


def _leaves(value: Any) -> Iterator[str]:
    """The keys and strings of a JSON value. Numbers, true, false and null have many spellings; they stand or
    fall with their keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _said_of(tool: Mapping[str, Any]) -> Iterator[str]:
    """Of a tool: its name, what it is for, and the names of its parameters; its schema has many spellings."""
    inner = tool.get("function")
    inner = inner if isinstance(inner, dict) else tool
    parameters = inner.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    yield from (inner[key] for key in ("name", "description") if isinstance(inner.get(key), str))
    yield from (str(name) for name in (properties if isinstance(properties, dict) else ()))
