"""What is read of a row beside the columns of its format: the keys of a turn, and the roles of ShareGPT.

The tables here are what the readers use and what docs/data.md shows. Which columns a format reads it says
itself (formats/); what else a row has is counted here, as "not read", or refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any

from .errors import BadRow, kind

LEARN_KEYS = ("weight", "train", "training")  # OpenAI, ShareGPT, Axolotl: synonyms
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")

TURN_KEYS = {
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


def unread(row: Mapping[str, Any], read: Set[str]) -> list[str]:
    """The columns of a row that hold something and that its format does not read. BadRow where such a column
    would change the loss."""
    found = []
    for name, value in row.items():
        if name in read or value is None or value == "" or value == []:
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
