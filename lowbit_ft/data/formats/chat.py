"""format: chat. Rows {"messages"} (or "conversations") in the tokenizer's chat template; the turns of the
assistant are learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..chat import ChatTemplate, read_messages
from ..read import BadRow, kind
from .base import Format, Tokens


class Chat(Format):
    needs_template = True

    def __init__(self, train_on: str, tokenizer: Any):
        super().__init__(train_on, tokenizer)
        self.template = ChatTemplate(tokenizer)
        if not self.template.closing.strip():
            self.notes.append(
                "the chat template writes no end-of-turn token after an assistant turn: "
                "the model will not learn to stop"
            )

    def __call__(self, row: Mapping[str, Any]) -> Tokens:
        messages = read_messages(row)
        tools = row.get("tools") or None
        if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
            raise BadRow(f"'tools' must be a list of objects; got {kind(tools)}")
        if self.train_on != "all" and not any(m["role"] == "assistant" for m in messages):
            roles = ", ".join(sorted({repr(m["role"][:40]) for m in messages}))
            raise BadRow(f"no assistant turn to learn from; the roles are: {roles}")
        text = self.template.render(messages, tools)
        if self.train_on == "all":
            ids = self.encode(text, special=False)[0]
            return Tokens(ids, [True] * len(ids))
        spans = self.template.assistant_spans(messages, tools, text)
        ids, learned = self.mark(text, spans[-1:] if self.train_on == "completion" else spans)
        if not any(learned):
            raise BadRow("the chat template writes nothing for the assistant turns")
        return Tokens(ids, learned)
