"""Chat templates: a chat as text, and which characters of it are a turn's.

The span of an assistant turn i is found from the template, whatever it is, in this order:

  1. `{% generation %}` tags, if the template has them;
  2. growing prefixes: it starts where render(messages[:i], add_generation_prompt=True) ends and ends where
     render(messages[:i+1]) ends, if these are prefixes of the whole rendering;
  3. a marker: the turn's content is replaced by a marker word; what stands before and after the marker must
     then be a prefix and a suffix of the whole rendering. This is for templates that write older turns
     differently (Qwen3 drops the thoughts of all turns but the last) or have no generation prompt (Mistral).
     It is the only way for turns of other roles.

If none holds, the row is refused: a wrong mask is worse than none. The end of a span always includes the
template's end-of-turn text (`<|im_end|>`, ` </s>`), found once by rendering small chats, but not the line
break behind it, which no server ever asks the model for. A template may end the last turn of a chat with more
than the others (Phi-3: `<|end|>`, then `<|endoftext|>`), so there are two such texts.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import Any

from .errors import BadRow, DataError, first_line

Span = tuple[int, int]  # characters [start, end)

# A template is a program of a stranger. The sandbox of transformers keeps it from everything but time: a
# range in a range in a range runs for years. An honest one takes milliseconds.
RENDER_SECONDS = 3
_MARKER = "Zq7MarkerTurnQz"
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
    """A tokenizer's chat template: renders chats and finds the turns in them.

    Attributes: closing, the text it writes behind an assistant turn that is the last ("" if none or not
    known); middle, the one behind an assistant turn that a user's follows. Raises DataError when the
    tokenizer has no template; the methods raise BadRow.
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template, which format: chat "
                "needs; use format: completion, "
                "or put a chat_template.jinja beside the tokenizer"
            )
        self.tokenizer = tokenizer
        self._template = tokenizer.get_chat_template()
        self._tagged = bool(_GENERATION_TAG.search(self._template))
        user = [{"role": "user", "content": "a"}]
        reply = [*user, {"role": "assistant", "content": _MARKER}]
        self.closing, self.middle, self._prompts, self._opening = "", "", False, ""
        try:
            head, _, self.closing = self.render(reply).rpartition(_MARKER)
            self.middle, asked = self.closing, self.render(user)
            self._prompts = self.render(user, prompt=True) != asked
            self._opening = head[len(asked) :] if head.startswith(asked) else ""
            self.middle = self._between_turns()
        except BadRow:
            pass  # a template for other roles than these; the rows will show what it can do

    def _between_turns(self) -> str:
        """`middle`: of what stands between an answer and the next user's words, the part that is not the
        user's opening. What the last turn ends with too is no opening, nor is what does not open the first
        turn."""
        ask = {"role": "user", "content": _MARKER}
        answer = {"role": "assistant", "content": _MARKER}
        parts = self.render([ask, answer, ask]).split(_MARKER)
        if len(parts) != 4:
            return self.closing  # a template that writes turns twice or not at all
        opening, _, between, _ = parts
        if between.startswith(self.closing):
            return self.closing
        # A border lies between tokens: not inside a special one, nor inside a <tag> or [TAG] that is none.
        special = [
            *getattr(self.tokenizer, "all_special_tokens", ()),
            *getattr(self.tokenizer, "added_tokens_encoder", ()),
        ]
        atoms = re.compile(
            "|".join(
                [*map(re.escape, sorted(special, key=len, reverse=True)), r"<[^<>\s]*>", r"\[[^][\s]*\]"]
            )
        )

        def border(at: int, text: str, back: bool) -> int:
            for atom in atoms.finditer(text):
                if atom.start() < at < atom.end():
                    return atom.start() if back else atom.end()
            return at

        same = len(os.path.commonprefix([between, self.closing]))
        same = min(border(same, between, True), border(same, self.closing, True))
        shared = os.path.commonprefix([between[::-1], opening[::-1]])
        start = border(len(between) - len(shared), between, False) if shared else 0
        return between[: max(same, start)]

    @cached_property
    def _call_form(self) -> tuple[str | None, bool]:
        """How the template wants a turn that is a call: its content (none or ""), and arguments as text or
        not. The first form that is written as JSON and without the word None; else the first without it."""
        call = {"name": "probe", "arguments": {"k": "v"}}
        calls = [
            {"id": "abcdefgh1", "type": "function", "function": call}
        ]  # Mistral wants ids of nine letters
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": calls}]
        usable: list[tuple[str | None, bool]] = []
        for form in ((None, False), ("", False), (None, True), ("", True)):
            try:
                text = self.render(_formed(chat, form))
            except BadRow:
                continue
            if "None" not in text:
                if re.search(r'\{\s*"k"\s*:\s*"v"\s*\}', text):
                    return form
                usable.append(form)
        return usable[0] if usable else (None, False)

    def formed(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with their tool calls in the form that this template writes as JSON."""
        return _formed(messages, self._call_form) if any("tool_calls" in m for m in messages) else messages

    def ending(self) -> list[int]:
        """The token that ends an assistant turn, alone; all tokens of its end where that is no single token;
        empty where the template writes no end."""
        text = self.closing.strip()
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
        special = getattr(self.tokenizer, "added_tokens_decoder", {})
        return ids[:1] if ids[:1] and ids[0] in special else ids

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
                f"{self.tokenizer.name_or_path}: the chat template takes more than {RENDER_SECONDS} seconds "
                f"for {len(messages)} messages; "
                "its loops do not end in time: use another chat_template.jinja"
            ) from error
        except (
            Exception
        ) as error:  # a template is a program: it may raise anything, raise_exception() included
            raise BadRow(f"the chat template refuses these messages: {first_line(error)}") from error
        assert isinstance(text, str)
        return text

    def spans(
        self,
        messages: list[dict[str, Any]],
        tools: Any,
        text: str,
        turns: Sequence[int],
        places: Sequence[str],
        *,
        whole: bool = False,
    ) -> dict[int, list[Span]]:
        """The spans of these turns in `text`, the rendering of `messages`. whole: the turns themselves,
        whatever the template tags."""
        if self._tagged and not whole:
            return self._tagged_spans(messages, tools, text, turns, places)
        spans = [self._turn_span(messages, tools, text, i, places[i]) for i in turns]
        if any(here[1] > following[0] for here, following in pairwise(spans)):
            raise BadRow("the chat template does not write the turns in their order")
        return {turn: [span] for turn, span in zip(turns, spans, strict=True)}

    def writes(self, messages: list[dict[str, Any]], tools: Any, turn: int) -> bool:
        """Whether the content of a turn is written at all: another one in its place comes out."""
        marked = [{**m, "content": _MARKER} if i == turn else m for i, m in enumerate(messages)]
        try:
            return _MARKER in self.render(marked, tools)
        except BadRow:
            return True  # a template that looks at the content; then it was found by looking for it

    def _prefix(self, messages: list[dict[str, Any]], tools: Any, text: str, prompt: bool) -> int | None:
        """The length of the rendered messages if that is a prefix of `text`, else None."""
        try:
            part = self.render(messages, tools, prompt=prompt)
        except BadRow:
            return None
        return len(part) if text.startswith(part) else None

    def _turn_span(
        self, messages: list[dict[str, Any]], tools: Any, text: str, turn: int, place: str
    ) -> Span:
        start = end = None
        if messages[turn]["role"] == "assistant":
            last = turn == len(messages) - 1
            start = self._prefix(messages[:turn], tools, text, prompt=True) if self._prompts else None
            end = len(text) if last else self._prefix(messages[: turn + 1], tools, text, prompt=False)
        if start is None or end is None:
            marked_start, marked_end = self._marked_span(messages, tools, text, turn)
            start = marked_start if start is None else start
            end = marked_end if end is None else end
        if start is None and not self._prompts and messages[turn]["role"] == "assistant":
            # A call has no words to mark. Behind the earlier turns stands what opens an answer, if anything.
            start = self._prefix(messages[:turn], tools, text, prompt=False)
            if start is not None and text.startswith(self._opening, start):
                start += len(self._opening)
        if start is None or end is None or start >= end:
            cannot = "the chat template cannot be split at this assistant turn"
            if messages[turn]["role"] != "assistant":
                cannot = "the chat template cannot be split at this turn, which asks to be learned or not"
            raise BadRow(
                f"{place}: {cannot}: neither the "
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

    def _tagged_spans(
        self,
        messages: list[dict[str, Any]],
        tools: Any,
        text: str,
        turns: Sequence[int],
        places: Sequence[str],
    ) -> dict[int, list[Span]]:
        rendered, marked = self._tags(messages, tools)
        if not marked or rendered != text:
            raise BadRow("the chat template's {% generation %} tags mark nothing in these messages")
        tagged = [(start, self._closed(text, end)) for start, end in marked]
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        others = [turn for turn in turns if turn not in answers]
        spans = self.spans(messages, tools, text, others, places, whole=True) if others else {}
        wanted = [turn for turn in turns if turn in answers]
        if wanted == answers:
            # Where a turn has several tags, which is whose makes no difference to the mask.
            one_each = len(tagged) == len(answers)
            return spans | {t: [tagged[i]] if one_each else tagged for i, t in enumerate(answers)}
        for turn in wanted:
            # The tags of a turn are those that came with it.
            before, after = (self._tags(messages[:stop], tools) for stop in (turn, turn + 1))
            written = [rendered[s:e] for s, e in marked[: len(after[1])]]
            if [after[0][s:e] for s, e in after[1]] != written:
                raise BadRow(
                    f"{places[turn]}: which {{% generation %}} tags are this turn's cannot be told: the chat "
                    "template tags other words when later turns follow"
                )
            spans[turn] = tagged[len(before[1]) : len(after[1])]
        return spans

    def _tags(self, messages: list[dict[str, Any]], tools: Any) -> tuple[str, list[Span]]:
        """The rendering by a template with tags, and what they mark in it."""
        from transformers.utils import chat_template_utils  # slow to import; tags are rare

        if not messages:
            return "", []
        try:
            rendered, found = chat_template_utils.render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # as in render
            raise BadRow(f"the chat template refuses these messages: {first_line(error)}") from error
        marked: Any = found[0]  # [(start, end)]; annotated as something else there
        return rendered[0], list(marked)

    def _closed(self, text: str, end: int) -> int:
        """`end`, moved to the end of the template's end-of-turn text."""
        closings = [closing for closing in (self.closing, self.middle) if closing.strip()]
        end += next((len(closing) for closing in closings if text.startswith(closing, end)), 0)
        for closing in closings:
            if text.endswith(closing, 0, end):
                return end - (len(closing) - len(closing.rstrip()))
        return end


def _formed(messages: list[dict[str, Any]], form: tuple[str | None, bool]) -> list[dict[str, Any]]:
    """The messages with content `form[0]` where a call has none (None: no such key), and arguments as JSON
    text where form[1]."""
    empty, as_text = form

    def call(given: dict[str, Any]) -> dict[str, Any]:
        if isinstance(given.get("function"), dict):
            return given | {"function": call(given["function"])}
        if as_text and "arguments" in given:
            return given | {"arguments": json.dumps(given["arguments"], ensure_ascii=False)}
        return given

    formed = []
    for message in messages:
        if "tool_calls" in message:
            message = message | {"tool_calls": [call(given) for given in message["tool_calls"]]}
            if message["content"] is None:
                del message["content"]
                message |= {} if empty is None else {"content": empty}
        formed.append(message)
    return formed
