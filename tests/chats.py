"""Chats in few words, and what of them is learned, for the tests of rows."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from lowbit_ft.data.formats import format_of
from lowbit_ft.data.windows import Example
from tests.data_tools import TINY, targets

Q, A = "user", "assistant"


def tokenizer(template: str | None = None) -> Any:
    made = AutoTokenizer.from_pretrained(TINY)
    if template is not None:
        made.chat_template = template
    return made


def chat(*turns: Any) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": content, **more} for role, content, more in ((*t, {})[:3] for t in turns)
    ]


def runs(tok: Any, row: dict[str, Any], train_on: str = "assistant", format: str = "chat") -> list[str]:
    """The learned text of a row, one string per run."""
    tokens = format_of(format, train_on, tok)(row)
    labels = [i if t else -100 for i, t in zip(tokens.input_ids, tokens.learned, strict=True)]
    return targets(tok, Example(tokens.input_ids, labels, [len(labels)]))


def text_of(tok: Any, row: dict[str, Any], format: str = "chat") -> str:
    return tok.decode(format_of(format, "assistant", tok)(row).input_ids)


CALL = {
    "id": "abcdefgh1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Paris"}},
}
TOOL = {
    "name": "weather",
    "description": "the sky",
    "parameters": {"type": "object", "properties": {"city": {}}},
}
