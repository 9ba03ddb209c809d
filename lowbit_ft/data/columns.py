"""What is read of a row: the columns of each format, the keys of a turn, and the roles of ShareGPT.

The tables here are what the readers use, what the report calls "not read", and what docs/data.md shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import BadRow, kind

COLUMNS: dict[str, dict[str, str]] = {
    "chat": {
        "messages": "the turns, each with `role` and `content` (OpenAI, trl)",
        "conversations": "the turns, each with `from` and `value` (ShareGPT), where there are no `messages`",
        "system": "becomes the first turn, role system",
        "tools": "what the assistant may call: a list of objects, or JSON text of one; for the chat template",
    },
    "completion": {
        "prompt": "not learned, unless `train_on: all`",
        "completion": "learned, with the EOS token",
    },
    "alpaca": {
        "instruction": "what is asked",
        "input": "what it is asked of",
        "output": "learned, with the EOS token",
        "system": "stands where Alpaca's first sentence stands",
        "history": "earlier `[instruction, output]` pairs; their outputs are learned too, unless "
        "`train_on: completion`",
    },
    "text": {"text": "learned, with the EOS token"},
}

LEARN_KEYS = ("weight", "train", "training")  # OpenAI, ShareGPT, Axolotl: synonyms
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")

TURN_KEYS: dict[str, str] = {
    "role, content": "who says what; a list of `{type: text}` parts is joined",
    "from, value": "the same in ShareGPT; roles as below",
    "tool_calls": "calls of the assistant; `arguments` as JSON text becomes the object it says",
    "function_call": "one call, as OpenAI once wrote it: read as `tool_calls`",
    ", ".join(
        THOUGHT_KEYS
    ): "thoughts of the assistant; a learned turn whose thoughts the template drops is refused",
    ", ".join(LEARN_KEYS): "0 or false: the turn is not learned; 1 or true: it is, whatever its role",
}

# Of the layout with `from`. A function_call holds its calls as JSON text and becomes a turn of the assistant.
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}

# Words in a key's name that say it is about the loss.
_LOSS_WORDS = re.compile(
    r"(?:^|[_\W])(?:loss|train|trained|training|trainable|weights?|masks?|masked|unmasked|learn|learned)(?:$|[_\W])"
)
_ROW_LOSS = frozenset(
    f"{a}{b}"
    for a in ("loss", "sample", "train", "assistant", "completion", "label", "labels", "token")
    for b in ("_mask", "_masks", "_weight", "_weights")
) | {"weights", "masked", "labels_to_ignore"}


def unread(row: Mapping[str, Any], format: str) -> list[str]:
    """The columns of a row that hold something and that the format does not read. BadRow where such a column
    would change the loss."""
    read = COLUMNS[format]
    found = []
    for name, value in row.items():
        shadowed = name == "conversations" and format == "chat" and "messages" in row
        if (name in read and not shadowed) or value is None or value == "" or value == []:
            continue
        if name in _ROW_LOSS or (name in LEARN_KEYS and value not in (True, 1)):
            raise BadRow(
                f"column {name!r} is about the loss and is not read; what a row can say of it is a turn's "
                f"{', '.join(LEARN_KEYS)} (format: chat); drop the column if it means something else"
            )
        found.append(str(name))
    return found


def learn_flag(message: dict[str, Any], place: str) -> bool | None:
    """What a turn says of its own loss: True, False, or None where it says nothing. Takes the keys out of
    `message`. BadRow: another value, two that differ, or a key about the loss that is not known."""
    said: dict[str, bool] = {}
    for key in list(message):
        if key in LEARN_KEYS:
            value = message.pop(key)
            if value is None:
                continue
            if not isinstance(value, (bool, int, float)) or value not in (0, 1):
                got = repr(value) if isinstance(value, (int, float)) else kind(value)
                raise BadRow(
                    f"{place}.{key} must be 0, 1, true or false; got {got}: a turn is learned or is not"
                )
            said[key] = bool(value)
        elif isinstance(key, str) and _LOSS_WORDS.search(key.lower()) and message[key] is not None:
            raise BadRow(
                f"{place} has the key {key[:40]!r}, which is about the loss and is not known; "
                f"known: {', '.join(LEARN_KEYS)} (0, 1, true or false, of the whole turn)"
            )
    if len(set(said.values())) > 1:
        raise BadRow(f"{place}: {' and '.join(said)} say different things")
    return next(iter(said.values()), None)
