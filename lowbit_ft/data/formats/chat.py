"""format: chat. Rows {"messages"} (or "conversations") in the tokenizer's chat template; the turns of the
assistant are learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from ...speech.tokens import CODEC
from ..audit import not_written
from ..chat import ChatTemplate
from ..errors import BadRow
from ..messages import Conversation, read_chat
from .base import CODEC_TOLD, Format, Tokens


class Chat(Format):
    """A turn that says of itself that it is learned or not is believed, except that train_on: completion
    never learns an earlier turn."""

    columns = {
        "messages": "the turns, each with `role` and `content` (OpenAI, trl)",
        "conversations": "the turns, each with `from` and `value` (ShareGPT), where there are no `messages`",
        "system": "becomes the first turn, role system",
        "tools": "what the assistant may call: a list of objects, or JSON text of one; for the chat template",
        CODEC: CODEC_TOLD,
    }
    told_by = (("messages",), ("conversations",))
    needs_template = True

    def __init__(self, train_on: str, tokenizer: Any):
        super().__init__(train_on, tokenizer)
        self.template = ChatTemplate(tokenizer)
        if not self.template.closing.strip():
            self.notes.append(
                "the chat template writes no end-of-turn token after an assistant turn: "
                "the model will not learn to stop"
            )

    @classmethod
    def check(cls, row: Mapping[str, Any]) -> None:
        read_chat(row)

    def reads(self, row: Mapping[str, Any]) -> Set[str]:
        return self.columns.keys() - ({"conversations"} if "messages" in row else set())

    def __call__(self, row: Mapping[str, Any]) -> Tokens:
        chat, template = read_chat(row), self.template
        turns = self._turns(chat)
        messages, tools = template.formed(chat.messages), chat.tools
        text = template.render(messages, tools)
        if self.train_on == "all":
            out = [i for i, flag in enumerate(chat.learn) if flag is False]
            masked = template.spans(messages, tools, text, out, chat.places, whole=True)
            lost = not_written(chat, messages, text, dict.fromkeys(turns, text), template)
            ids, hidden = self.mark(text, [span for spans in masked.values() for span in spans])
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
        ids, learned = self.mark(text, [span for spans in found.values() for span in spans])
        if turns and not any(learned):
            raise BadRow("the chat template writes nothing for the assistant turns")
        return Tokens(ids, learned, tuple(lost))

    def _turns(self, chat: Conversation) -> list[int]:
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
