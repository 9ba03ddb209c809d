"""format: preference. Rows {"prompt", "chosen", "rejected"}: two answers to one prompt, of which one is the
better; and format: chosen, the better ones as plain rows.

The columns are those of trl's preference data sets, plain or conversational:

    plain            three strings; the tokenizer's BOS before, its EOS behind each answer
    conversational   three lists of turns in the chat template; an answer is all that stands behind the prompt
                     with its generation prompt, as in trl (so the line break behind the end of turn too)

Without `prompt`, or where it is text beside conversations that hold it, the prompt is what both answers begin
with. A row becomes two sequences, prompt and answer each, which share a window as segments: each has half of
data.sequence_len."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, ClassVar

from ..audit import not_written
from ..chat import ChatTemplate
from ..errors import BadRow, kind
from ..messages import Conversation, read_chat
from .base import Format, Tokens, string

ANSWERS = ("chosen", "rejected")


class Preference(Format):
    columns = {
        "prompt": "what is answered: text, or turns; without it, what both answers begin with",
        "chosen": "the better answer: text (with the EOS token), or turns",
        "rejected": "the other one",
        "tools": "of turns: what the assistant may call, for the chat template",
    }
    pairs: ClassVar[bool] = True
    alone: ClassVar[str | None] = "chosen"
    wanted: ClassVar[tuple[str, ...]] = ANSWERS

    def __init__(self, train_on: str, tokenizer: Any):
        super().__init__(train_on, tokenizer)
        self._template: ChatTemplate | None = None

    def reads(self, row: Mapping[str, Any]) -> Set[str]:
        return self.columns.keys() - (set() if isinstance(row.get("chosen"), list) else {"tools"})

    def __call__(self, row: Mapping[str, Any]) -> Tokens:
        prompt, answers = prompt_and_answers(row)
        if isinstance(prompt, str):
            made = [self.prompted(prompt, answers[name]) for name in self.wanted]
        else:
            made = [self._turns(prompt, answers[name], row, name) for name in self.wanted]
        return Tokens(
            [i for tokens in made for i in tokens.input_ids],
            [learned for tokens in made for learned in tokens.learned],
            tuple(dict.fromkeys(lost for tokens in made for lost in tokens.lost)),
            tuple(len(tokens.input_ids) for tokens in made),
        )

    def _turns(self, prompt: list[Any], answer: list[Any], row: Mapping[str, Any], name: str) -> Tokens:
        """A prompt of turns and an answer of turns, in the chat template."""
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer)
        template = self._template
        chat = _chat(prompt, answer, row, name)
        messages = template.formed(chat.messages)
        text = template.render(messages, chat.tools)
        asked = template.render(messages[: len(prompt)], chat.tools, prompt=True)
        if not text.startswith(asked):
            raise BadRow(
                f"{name!r}: the chat template writes the prompt otherwise when an answer follows, so where "
                "the answer begins cannot be told; use a template that writes both alike"
            )
        taught = dict.fromkeys(range(len(prompt), len(messages)), text[len(asked) :])
        lost = not_written(chat, messages, text, taught, template)
        ids, learned = self.mark(text, [(0 if self.train_on == "all" else len(asked), len(text))])
        if not any(learned):
            raise BadRow(f"{name!r}: the chat template writes nothing for the answer")
        return Tokens(ids, learned, tuple(lost))


class Chosen(Preference):
    columns = {
        **{name: what for name, what in Preference.columns.items() if name != "rejected"},
        "rejected": "not learned",
    }
    pairs: ClassVar[bool] = False
    alone: ClassVar[str | None] = None
    wanted: ClassVar[tuple[str, ...]] = ANSWERS[:1]


def prompt_and_answers(row: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the prompt, the two answers by name): text, or lists of turns. BadRow says what is wrong."""
    for name in ANSWERS:
        if isinstance(row.get(name), list):
            if not row[name]:
                raise BadRow(f"{name!r} is empty")
        elif name not in row or not isinstance(row[name], str):
            string(row, name)
    answers: dict[str, Any] = {name: row[name] for name in ANSWERS}
    turns = isinstance(row["chosen"], list)
    if turns != isinstance(row["rejected"], list):
        raise BadRow(f"'chosen' is {kind(row['chosen'])} and 'rejected' {kind(row['rejected'])}; both alike")
    prompt = row.get("prompt")
    if prompt is None or (turns and isinstance(prompt, str) and _holds(answers, prompt)):
        prompt, answers = _taken_out(answers)
    elif not isinstance(prompt, list if turns else str):
        raise BadRow(
            f"'prompt' is {kind(prompt)} and the answers are {kind(row['chosen'])}; give all three as text, "
            "or all as lists of turns"
        )
    if not prompt:
        raise BadRow("the prompt is empty: there is nothing that the answers are two answers to")
    if answers["chosen"] == answers["rejected"]:
        raise BadRow("'chosen' and 'rejected' are the same: nothing is preferred")
    for name, answer in answers.items():
        if not (answer.strip() if isinstance(answer, str) else answer):
            raise BadRow(f"{name!r} is empty behind the prompt")
    return prompt, answers


def _holds(answers: Mapping[str, Any], prompt: str) -> bool:
    """Whether both conversations hold a turn of that text before their last."""
    held = [[m.get("content") for m in turns[:-1] if isinstance(m, dict)] for turns in answers.values()]
    return all(prompt in contents for contents in held)


def _taken_out(answers: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What both answers begin with, and what is left of them: whole turns; of text, up to a space that both
    have there, which is the answer's."""
    both = list(answers.values())
    same = next((i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b), min(map(len, both)))
    if same and both[0][same - 1] == " ":
        same -= 1
    return both[0][:same], {name: answer[same:] for name, answer in answers.items()}


def _chat(prompt: list[Any], answer: list[Any], row: Mapping[str, Any], name: str) -> Conversation:
    chat = read_chat({"messages": [*prompt, *answer], "tools": row.get("tools")})
    places = [f"prompt[{i}]" for i in range(len(prompt))] + [f"{name}[{i}]" for i in range(len(answer))]
    for place, said in zip(places, chat.learn, strict=True):
        if said is not None:
            raise BadRow(f"{place} says whether it is learned; answers of preference rows are compared whole")
    return Conversation(chat.messages, chat.learn, chat.tools, places)
