"""Chats: the messages of a row, and which characters of the rendered chat are the assistant's.

The span of an assistant turn i is found from the template, whatever it is, in this order:

  1. `{% generation %}` tags, if the template has them;
  2. growing prefixes: it starts where render(messages[:i], add_generation_prompt=True) ends and ends where
     render(messages[:i+1]) ends, if these are prefixes of the whole rendering;
  3. a marker: the turn's content is replaced by a marker word; what stands before and after the marker must
     then be a prefix and a suffix of the whole rendering. This is for templates that write older turns
     differently (Qwen3 drops the thoughts of all turns but the last) or have no generation prompt (Mistral).

If none holds, the row is refused: a wrong mask is worse than none. The end of a span always includes the
template's end-of-turn text (`<|im_end|>`, ` </s>`), found once by rendering a small chat, but not the line
break behind it, which no server ever asks the model for.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from .read import BadRow, DataError, first_line, kind

Span = tuple[int, int]  # characters [start, end)

# A template is a program of a stranger. The sandbox of transformers keeps it from everything but time: a
# range in a range in a range runs for years. An honest one takes milliseconds.
RENDER_SECONDS = 10
_MARKER = "Zq7MarkerTurnQz"
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = {  # of the `conversations` layout
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class TemplateTime(BaseException):
    """No Exception, so that a template's own error handling, or a library's, cannot take it for one."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TemplateTime in the block after so many seconds of this process's own work (a busy machine stops no
    honest template). Signals reach the main thread only, so elsewhere nothing is bounded; rows are rendered
    in the main thread.
    """
    if not hasattr(signal, "SIGVTALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TemplateTime

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class ChatTemplate:
    """A tokenizer's chat template: renders chats and finds the assistant turns in them.

    Attributes: closing, the text it writes behind an assistant turn ("" if none or not known). Raises
    DataError when the tokenizer has no template; the methods raise BadRow.
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "the tokenizer has no chat template, which format: chat needs; use format: completion, "
                "or put a chat_template.jinja beside the tokenizer"
            )
        self.tokenizer = tokenizer
        self._template = tokenizer.get_chat_template()
        self._tagged = bool(_GENERATION_TAG.search(self._template))
        user = [{"role": "user", "content": "a"}]
        reply = [*user, {"role": "assistant", "content": _MARKER}]
        self.closing, self._prompts = "", False
        try:
            self.closing = self.render(reply).rpartition(_MARKER)[2]
            self._prompts = self.render(user, prompt=True) != self.render(user)
        except BadRow:
            pass  # a template for other roles than these; the rows will show what it can do

    def ending(self) -> int | None:
        """Id of the token that ends an assistant turn; None where the template writes none."""
        ids = (
            self.tokenizer(self.closing.strip(), add_special_tokens=False)["input_ids"]
            if self.closing.strip()
            else []
        )
        return ids[0] if ids else None

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, prompt: bool = False
    ) -> str:
        """The chat as text; `prompt`: up to where the assistant is to go on."""
        try:
            with limited(RENDER_SECONDS):
                text = self.tokenizer.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
                )
        except TemplateTime as error:
            raise DataError(
                f"the chat template takes more than {RENDER_SECONDS} seconds for {len(messages)} messages; "
                "its loops do not end in time: use another chat_template.jinja"
            ) from error
        except (
            Exception
        ) as error:  # a template is a program: it may raise anything, raise_exception() included
            raise BadRow(f"the chat template refuses these messages: {first_line(error)}") from error
        assert isinstance(text, str)
        return text

    def assistant_spans(self, messages: list[dict[str, Any]], tools: Any, text: str) -> list[Span]:
        """The spans of the assistant turns in `text`, the rendering of `messages`, in order."""
        if self._tagged:
            return self._tagged_spans(messages, tools, text)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        spans = [self._turn_span(messages, tools, text, i) for i in turns]
        if any(here[1] > following[0] for here, following in pairwise(spans)):
            raise BadRow("the chat template does not write the turns in their order")
        return spans

    def _prefix(self, messages: list[dict[str, Any]], tools: Any, text: str, prompt: bool) -> int | None:
        """The length of the rendered messages if that is a prefix of `text`, else None."""
        try:
            part = self.render(messages, tools, prompt=prompt)
        except BadRow:
            return None
        return len(part) if text.startswith(part) else None

    def _turn_span(self, messages: list[dict[str, Any]], tools: Any, text: str, turn: int) -> Span:
        last = turn == len(messages) - 1
        start = self._prefix(messages[:turn], tools, text, prompt=True) if self._prompts else None
        end = len(text) if last else self._prefix(messages[: turn + 1], tools, text, prompt=False)
        if start is None or end is None:
            marked_start, marked_end = self._marked_span(messages, tools, text, turn)
            start = marked_start if start is None else start
            end = marked_end if end is None else end
        if start is None or end is None or start >= end:
            raise BadRow(
                f"messages[{turn}]: the chat template cannot be split at this assistant turn: neither the "
                "messages before it nor a marker in its place render to a part of the whole; use a template "
                "with {% generation %} tags, or train_on: all"
            )
        return start, self._closed(text, end)

    def _marked_span(
        self, messages: list[dict[str, Any]], tools: Any, text: str, turn: int
    ) -> tuple[int | None, int | None]:
        content = messages[turn].get("content")
        if not content:
            return None, None
        marked = [{**m, "content": _MARKER} if i == turn else m for i, m in enumerate(messages)]
        try:
            head, found, tail = self.render(marked, tools).partition(_MARKER)
        except BadRow:
            return None, None
        if not found or _MARKER in tail:
            return None, None
        # The template may drop the thoughts or trim, but the answer itself must stand where the marker stood.
        answer = content.rpartition("</think>")[2].strip()
        start = len(head) if text.startswith(head) else None
        end = len(text) - len(tail) if text.endswith(tail) else None
        if end is not None and not text[start or 0 : end].rstrip().endswith(answer):
            return None, None
        return start, end

    def _tagged_spans(self, messages: list[dict[str, Any]], tools: Any, text: str) -> list[Span]:
        from transformers.utils.chat_template_utils import render_jinja_template

        plain = [{k: v for k, v in m.items() if v is not None} for m in messages]
        try:
            rendered, found = render_jinja_template(
                conversations=[plain],
                tools=tools,
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # as in render
            raise BadRow(f"the chat template refuses these messages: {first_line(error)}") from error
        spans: list[Any] = list(found[0])
        if not spans or rendered[0] != text:
            raise BadRow("the chat template's {% generation %} tags mark nothing in these messages")
        return [(start, self._closed(text, end)) for start, end in spans]

    def _closed(self, text: str, end: int) -> int:
        """`end`, moved to the end of the template's end-of-turn text."""
        closing = self.closing
        if not closing.strip():
            return end
        if text.startswith(closing, end):
            end += len(closing)
        if text.endswith(closing, 0, end):
            end -= len(closing) - len(closing.rstrip())
        return end


def read_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The chat of a row as [{"role", "content", ...}], checked. Accepts `messages` and `conversations`."""
    key = "messages" if "messages" in row else "conversations"
    if key not in row:
        keys = ", ".join(repr(k) for k in list(row)[:8]) or "none"
        raise BadRow(f"key 'messages' (or 'conversations') is missing; the row's keys are: {keys}")
    items = row[key]
    if not isinstance(items, list):
        raise BadRow(f"{key!r} must be a list of messages; got {kind(items)}")
    if not items:
        raise BadRow(f"{key!r} is empty")
    return [_message(item, f"{key}[{i}]") for i, item in enumerate(items)]


def _message(item: object, place: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise BadRow(f"{place} must be an object; got {kind(item)}")
    message = dict(item)
    if "role" not in message and "from" in message:
        role = _string_of(message.pop("from"), f"{place}.from")
        if role not in _ROLES:
            raise BadRow(f"{place}.from is {role[:40]!r}; known: {', '.join(_ROLES)}")
        message["role"], message["content"] = _ROLES[role], message.pop("value", None)
    if "role" not in message:
        raise BadRow(f"{place}: key 'role' is missing")
    role = _string_of(message["role"], f"{place}.role")
    content = message.get("content")
    if isinstance(content, list):  # the parts layout of vision models; text is all we train on
        texts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        if not all(isinstance(t, str) for t in texts):
            raise BadRow(f"{place}.content has a part that is not text; only text can be trained on")
        content = message["content"] = "".join(str(t) for t in texts)
    if content is None and message.get("tool_calls"):
        return message
    if content is None:
        raise BadRow(f"{place}: {'content is null' if 'content' in message else 'content is missing'}")
    if not isinstance(content, str):
        raise BadRow(f"{place}.content must be a string; got {kind(content)}")
    if role == "assistant" and not content.strip() and not message.get("tool_calls"):
        raise BadRow(f"{place}: the assistant's content is empty")
    return message


def _string_of(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{place} must be a string; got {kind(value)}")
    return value
