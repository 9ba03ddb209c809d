"""kind: task_labels. Rows of a task without data: the model writes what is asked, answers it, and corrects
the answers of its own rows.

What zero-shot quantization of detectors does with images (arXiv 2507.16782: labels are drawn, an input is
made for them, and the teacher's own answers replace them until both agree), done with text, where an input
is written and not inverted:

    slots, answer drawn  ->  input written for them  ->  answered by the model  ->  kept, relabelled, dropped

With a label space (`answers`) every label is scored behind every input. Without one the answer is written
too: the likeliest tokens, or with `relabel: false` drawn ones; its confidence decides. Near repetitions of an
input are dropped, and inputs whose perplexity is outside of a band.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from .base import Count, Share
from .judged import RELABELLED, Overlap, among, fate, mean_log_p, token_log_p
from .schema import ANSWER, INPUT, Asked, Schema, wrong_prompt
from .text import TextConfig
from .voice import Row, Rows, Voice

COLLAPSED, REPEATED = 0.9, 0.25  # the share of one answer that is worth a warning: of a space, of free text
NO_END, OUTSIDE = "no end", "perplexity"
Perplexity = Annotated[float, Field(ge=1)]
Words = Annotated[str, Field(min_length=1)]


class TaskLabelsConfig(TextConfig):
    kind: Literal["task_labels"] = "task_labels"
    prompt: Words = Field(
        description="what is asked: {input} is what the model writes, other {names} are slots"
    )
    slots: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(
        default_factory=dict, description="what stands in the other names, drawn evenly"
    )
    answers: Annotated[list[Words], Field(min_length=2)] | None = Field(
        default=None, description="the label space, drawn evenly; null: the answer is free text"
    )
    write: Words | None = Field(
        default=None, description="how an {input} for an {answer} of the space is asked for; null: the prompt"
    )
    chat: bool = Field(
        default=True, description="the prompt is a user's turn; false: plain text that ends with {answer}"
    )
    until: list[Words] = Field(
        default_factory=list,
        description="texts that end an input, beside end tokens; without a chat an answer too",
    )
    input_tokens: Count = Field(default=128, description="of an input at most; one that goes on is dropped")
    answer_tokens: Count = Field(default=48, description="of an answer at most; one that goes on is dropped")
    deterministic_prefix: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        default=[0], description="tokens of an input of which the likeliest is taken; a row has one of these"
    )
    relabel: bool = Field(
        default=True, description="correct a label; of free text take the likeliest answer, not a drawn one"
    )
    p_high: Share = Field(default=0.5, description="confidence from which on an answer is sure")
    p_low: Share = Field(default=0.2, description="confidence below which a row is dropped")
    max_overlap: Share = Field(
        default=0.7, description="share of filter.ngram-grams that two inputs have in common, at most"
    )
    perplexity: tuple[Perplexity, Perplexity] | None = Field(
        default=None, description="[least, most] of an input, by the model; null: any"
    )

    without_template: ClassVar[str] = "chat: false"

    @property
    def needs_template(self) -> bool:
        return self.chat

    @model_validator(mode="after")
    def _task(self) -> TaskLabelsConfig:
        if why := wrong_prompt(self.prompt, self.slots, self.chat):
            raise ValueError(f"prompt: {self.prompt[:40]!r} {why}")
        if taken := {INPUT, ANSWER} & self.slots.keys():
            raise ValueError(f"slots: {sorted(taken)[0]!r} is no slot: the model writes there; rename it")
        if self.write is not None:
            if self.answers is None:
                raise ValueError("write: an input is written for an answer; add answers: [...], or remove it")
            if why := wrong_prompt(self.write, self.slots, self.chat, says_answer=True):
                raise ValueError(f"write: {self.write[:40]!r} {why}")
        if self.answers is not None and len(set(self.answers)) < len(self.answers):
            raise ValueError("answers: one stands there twice; name each once")
        if self.p_low > self.p_high:
            raise ValueError(f"p_low {self.p_low} above p_high {self.p_high}; lower it")
        if self.perplexity is not None and self.perplexity[0] >= self.perplexity[1]:
            raise ValueError(f"perplexity {list(self.perplexity)}; give [least, most]")
        return self

    def problem(self, longest: int) -> tuple[str, str] | None:
        answer = 0 if self.answers is not None else self.answer_tokens
        if self.input_tokens + answer < longest:
            return super().problem(min(longest, self.input_tokens + 1))
        return (
            "input_tokens",
            f"got {self.input_tokens}, with an answer {self.input_tokens + answer} of rows of {longest} "
            "tokens; lower it, or answer_tokens, or raise max_len",
        )

    def rows(self, voice: Voice) -> Rows:
        return TaskRows(self, voice)


class TaskRows(Rows):
    """first: tokens that all rows begin with, of their own heads."""

    def __init__(self, config: TaskLabelsConfig, voice: Voice):
        self.config, self.voice, self.count = config, voice, config.samples or 0
        if not self.count:
            raise ValueError(
                "data.synthesis.samples: got null; rows of a task cannot be counted; give a number"
            )
        self.schema = Schema(voice, config.chat)
        self.labels = [self.schema.answer(one) for one in config.answers or ()]
        self.cache = dict[tuple[Any, ...], Asked]()
        self.ends = self.schema.ends
        asked = [self.asked(number, config.write or config.prompt) for number in range(self.count)]
        self.drawable = self.ends | frozenset(one.between[0] for one in asked) & voice.special
        self.first = min(len(one.head) for one in asked)
        longest = max(
            len(one.head) + len(one.between)
            for number in range(self.count)
            for one in (self.asked(number, config.prompt), asked[number])
        )
        answer = max(map(len, self.labels), default=config.answer_tokens)
        if not self.first or longest + config.input_tokens + answer > voice.max_len:
            raise ValueError(
                f"data.synthesis.max_len: got {voice.max_len}; the prompt has up to {longest} tokens, "
                f"an input {config.input_tokens}, an answer {answer}; raise it, or lower input_tokens"
            )
        kinds = len(set(asked))
        self.notes = [f"{kinds:,} prompts to write behind, of {longest} tokens at most, without input"]
        self.answers, self.fates = Counter[str](), Counter[str]()
        self.near = Overlap(config.filter.ngram, config.max_overlap)

    def fill(self, number: int) -> dict[str, str]:
        """What stands in the slots of a row, and the answer that is wanted; all of a space in turn."""
        chance = random.Random(f"{self.config.seed}/{number}")
        found = {name: chance.choice(words) for name, words in sorted(self.config.slots.items())}
        space = self.config.answers
        return found if space is None else {**found, ANSWER: space[number % len(space)]}

    def asked(self, number: int, prompt: str) -> Asked:
        fill = self.fill(number)
        key = (prompt, *sorted(fill.items()))
        if key not in self.cache:
            self.cache[key] = self.schema.asked(prompt, fill)
        return self.cache[key]

    def __getitem__(self, number: int) -> Row:
        return TaskRow(self, number)

    def completes(self, ids: Sequence[int]) -> bool:
        """Whether the last token of an input completes a text that ends it."""
        until = self.config.until
        tail = ids[-1 - 4 * max(map(len, until), default=0) :]  # a token has a byte, a character up to four
        return bool(until) and any(text in self.voice.text(tail) for text in until)

    def before(self, ids: Sequence[int]) -> int:
        """How many tokens lie whole before the text that ends `ids`, which the last one completes: that may
        be several tokens, or the end of one."""
        text, count = self.voice.text(ids), len(ids) - 1
        found = [at for at in map(text.find, self.config.until) if at >= 0]
        while found and count and len(self.voice.text(ids[:count])) > min(found):
            count -= 1
        return count

    def judge(self, model: Any, rows: Sequence[Row]) -> list[str | None]:
        written = [row for row in rows if isinstance(row, TaskRow) and row.ended]
        per_row = [row.candidates() for row in written]
        said = iter(token_log_p(model, [ids for several in per_row for ids, _ in several]))
        verdicts = dict[int, str | None]()
        for row, several in zip(written, per_row, strict=True):
            verdicts[id(row)] = row.hear([(ids, start, next(said)) for ids, start in several])
        return [verdicts.get(id(row), NO_END) for row in rows]

    def repeats(self, row: Mapping[str, Any]) -> bool:
        return self.near.repeats(_input_of(row))

    def remember(self, row: Mapping[str, Any]) -> None:
        self.near.add(_input_of(row))
        self.answers[row["about"]["answer"]] += 1
        self.fates[row["about"]["fate"]] += 1

    def warnings(self) -> list[str]:
        space, total = self.config.answers, self.answers.total()
        if not total:
            return []
        found, (word, most) = [], self.answers.most_common(1)[0]
        if most > (REPEATED if space is None else COLLAPSED) * total:
            found.append(
                f"{most / total:.0%} of the rows have one answer ({word[:40]!r}): the labels have collapsed; "
                "look at synthesis/, and change the prompt, the slots, write or the temperature"
            )
        if missing := [one for one in space or () if not self.answers[one]]:
            found.append(f"no row is answered {missing[0]!r} ({len(missing)} of {len(space or ())} labels)")
        return found


def _input_of(row: Mapping[str, Any]) -> list[int]:
    start, end = row["about"]["input"]
    return row["input_ids"][start:end]


class TaskRow(Row):
    """start, end: of the input, by tokens; end is 0 while it is written. cut: tokens at its end that are of
    the text that ended it, which an answer was written behind. answered: where a written answer begins."""

    def __init__(self, rows: TaskRows, number: int):
        config = rows.config
        self.rows, self.number = rows, number
        self.asked = rows.asked(number, config.write or config.prompt)
        super().__init__(self.asked.head[: rows.first])
        prefixes = config.deterministic_prefix
        self.start, self.end = len(self.asked.head), 0
        self.greedy = self.start + prefixes[number % len(prefixes)]
        self.answered, self.ended, self.cut = 0, False, 0
        self.about: dict[str, Any] = {}

    def take(self, likeliest: int, drawn: int) -> bool:
        rows, ids, at, between = self.rows, self.ids, len(self.ids), self.asked.between
        free = rows.config.answers is None
        if at < self.start:
            ids.append(self.asked.head[at])
        elif not self.end:
            token = likeliest if at < self.greedy else drawn
            written = [*ids[self.start :], token]
            done = rows.completes(written)
            if token not in rows.ends | {between[0]} & rows.voice.special and not done:
                ids.append(token)
                return len(ids) - self.start < rows.config.input_tokens
            self.end, self.answered = at, at + len(between)
            self.cut = at - self.start - rows.before(written) if done else 0
            if not free:
                self.ended = True
                return False
            ids.append(between[0])  # in place of whatever ended the input
        elif at < self.answered:
            ids.append(between[at - self.end])
        else:
            token = likeliest if rows.config.relabel else drawn
            written = [*ids[self.answered :], token]
            if not rows.config.chat and rows.completes(written):
                del ids[self.answered + rows.before(written) :]
                token = rows.schema.end
            ids.append(token)
            self.ended = ids[-1] in rows.ends
            return not self.ended and len(ids) - self.answered < rows.config.answer_tokens
        return True

    @property
    def input(self) -> list[int]:
        return self.ids[self.start : self.end - self.cut if self.end else len(self.ids)]

    def wrote(self) -> list[list[int]]:
        """The input last: the filter asks of it to be long enough, of an answer only to be there."""
        if not self.end or self.rows.config.answers is not None:
            return [self.input]
        answer = self.ids[self.answered :]
        return [answer[:-1] if self.ended else answer, self.input]

    def candidates(self) -> list[tuple[list[int], int]]:
        """The row with every answer it may get, as the task asks it, and where the answer begins."""
        asked, rows = self.rows.asked(self.number, self.rows.config.prompt), self.rows
        answers = rows.labels or [self.ids[self.answered :]]
        start = len(asked.head) + len(self.input) + len(asked.between)
        return [(rows.schema.row(asked, self.input, answer), start) for answer in answers]

    def hear(self, said: Sequence[tuple[list[int], int, Any]]) -> str | None:
        """What the model says of the candidates (tokens, where the answer begins, log p): the row takes the
        one it gets. Returns why it is dropped, or None."""
        config, asked = self.rows.config, self.rows.asked(self.number, self.rows.config.prompt)
        log_c = [mean_log_p(log_p, start, len(ids)) for ids, start, log_p in said]
        space = config.answers
        p = [math.exp(log_c[0])] if space is None else among(log_c)
        own = 0 if space is None else self.number % len(space)
        what, chosen = fate(p, own, config.p_high, config.p_low, config.relabel)
        at = own if chosen is None else chosen
        head, count = len(asked.head), len(self.input)
        heard = math.exp(-mean_log_p(said[0][2], head, head + count))
        self.ids, start, _ = said[at]
        self.start, self.end, self.answered, self.cut = head, head + count, start, 0
        answer = self.rows.voice.text(self.ids[start:-1]) if space is None else space[at]
        self.about = {
            "input": [self.start, self.end],
            "answer": answer,
            "confidence": round(p[at], 6),
            "perplexity": round(heard, 4),
            "fate": what,
        }
        if what == RELABELLED:
            self.about["before"] = (space or [""])[own]
        if chosen is None:
            return what
        least, most = config.perplexity or (1.0, math.inf)
        return None if least <= heard <= most else OUTSIDE

    def facts(self) -> dict[str, Any]:
        voice = self.rows.voice
        if not self.about:
            return {"text": voice.text(self.ids)}
        before, after = self.rows.asked(self.number, self.rows.config.prompt).words
        asked = before + voice.text(self.input) + after
        found: dict[str, Any] = {"learned": [[self.answered, len(self.ids)]], "about": self.about}
        if not self.rows.config.chat:
            return {**found, "text": asked + self.about["answer"]}
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": self.about["answer"]}]
        return {**found, "messages": turns}
