"""data.synthesis task_labels: a task as it is asked, rows against a plain loop, what answers become."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lowbit_ft.data.formats import format_of
from lowbit_ft.data.synthesis import SYNTHESIS, Voice
from lowbit_ft.data.synthesis.draw import uniforms
from lowbit_ft.data.synthesis.folder import RowsFolder, fill, read_state
from lowbit_ft.data.synthesis.judged import Overlap, among, fate, mean_log_p, token_log_p
from lowbit_ft.data.synthesis.task_labels import TaskRows
from lowbit_ft.data.synthesis.text import Pages
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from lowbit_ft.report.files import RunFiles
from lowbit_ft.report.html import escape
from lowbit_ft.report.synthesis import synthesis_section
from tests.data_tools import TINY

STOPS = (0, 3)
LOOSE = {"min_tokens": 1, "max_repetition": 1.0, "max_run": 9999, "max_unreadable": 1.0}
FREE: dict[str, Any] = {
    "kind": "task_labels",
    "prompt": "Name it.\ndef {verb}{input}",
    "slots": {"verb": ["get_", "is_", "write_the_file_of"]},
    "until": ["\n"],
    "input_tokens": 24,
    "answer_tokens": 16,
    "samples": 12,
    "batch_size": 5,
    "p_low": 0.0,
    "max_overlap": 1.0,
    "filter": LOOSE,
}
SPACE: dict[str, Any] = {
    **FREE,
    "prompt": "Is it a {thing}?\n{input}",
    "slots": {"thing": ["test", "method"]},
    "write": "Write a {thing}, the answer is {answer}.\ndef {input}",
    "answers": ["yes", "certainly not"],
}


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(Checkpoint.open(str(TINY), dtype="float32"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def pages(tokenizer: Any, keys: dict[str, Any], max_len: int = 96) -> Pages:
    config: Any = SYNTHESIS["task_labels"].model_validate(keys)
    voice = Voice(tokenizer, STOPS, max_len, 4096)
    return Pages(config, config.rows(voice), voice)


def made(model: Any, tokenizer: Any, keys: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """All rows of a recipe by their numbers, dropped ones too."""
    maker, size = pages(tokenizer, keys), keys["batch_size"]
    shards = [
        maker.write(range(at, min(maker.count, at + size)), model, lambda rows, tokens: None)
        for at in range(0, maker.count, size)
    ]
    rows = [row for shard in shards for lines in shard.lines.values() for row in lines]
    assert sum(shard.units for shard in shards) > 0
    return {row["row"]: row for row in rows}


def log_p(model: Any, ids: list[int]) -> torch.Tensor:
    """log p of every token but the first, float64, of the row alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------ written


def test_rows_are_those_of_a_plain_loop(model: Any, tokenizer: Any) -> None:
    """No cache, no batch: the whole row again for every token. Answers are the likeliest tokens."""
    found = made(model, tokenizer, FREE)
    assert sorted(found) == list(range(12))
    rows = pages(tokenizer, FREE).rows
    assert isinstance(rows, TaskRows)
    v, ends = rows.voice, {0, 3}
    first, ended = rows.first, 0
    for number in range(4):
        asked = rows.asked(number, FREE["prompt"])
        verb = rows.fill(number)["verb"]
        user = [{"role": "user", "content": f"Name it.\ndef {verb}"}]
        text = tokenizer.apply_chat_template(user, tokenize=False)
        assert tokenizer.decode(asked.head) == text.removesuffix("<|im_end|>\n")
        ids, start, u = list(asked.head), len(asked.head), uniforms(0, number, 96)
        banned = torch.tensor([i in v.special and i not in rows.drawable for i in range(4096)])

        def step(ids: list[int], banned: torch.Tensor = banned) -> torch.Tensor:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            return logits.masked_fill(banned, float("-inf"))

        while len(ids) - start < 24:
            p = step(ids).softmax(-1).double().cumsum(-1)
            token = int(torch.searchsorted(p, u[len(ids) - first] * p[-1], right=True))
            if token in ends or "\n" in tokenizer.decode([*ids[start:], token]):
                break
            ids.append(token)
        else:
            assert found[number]["dropped"] == "no end"
            continue
        if len(ids) == start:
            continue
        end = len(ids)
        ids += asked.between
        while ids[-1] not in ends or len(ids) == end + len(asked.between):
            ids.append(int(step(ids).argmax()))
            if len(ids) == end + len(asked.between) + 16:
                break
        ended += 1
        assert found[number]["input_ids"] == ids
        if "about" in found[number]:
            assert found[number]["about"]["input"] == [start, end]
    assert ended, "nothing was compared"


def test_what_is_said_of_a_row_is_what_the_model_says(model: Any, tokenizer: Any) -> None:
    judged = [row for row in made(model, tokenizer, FREE).values() if "about" in row]
    assert judged
    for row in judged:
        ids, (start, end), ((answer, last),) = row["input_ids"], row["about"]["input"], row["learned"]
        p = log_p(model, ids)
        assert last == len(ids) and ids[-1] == 3
        assert row["about"]["confidence"] == pytest.approx(math.exp(p[answer - 1 :].mean()), abs=1e-5)
        assert row["about"]["perplexity"] == pytest.approx(math.exp(-p[start - 1 : end - 1].mean()), rel=1e-4)
        turns = row["messages"]
        assert tokenizer.decode(ids[answer:-1], skip_special_tokens=True) == turns[1]["content"]
        tokens = format_of("tokens", "assistant", tokenizer)(row)  # trained on: the answer with its end
        assert [i for i, yes in enumerate(tokens.learned) if yes] == list(range(answer, len(ids)))


def test_labels_of_a_space_are_scored_and_corrected(model: Any, tokenizer: Any) -> None:
    """Every label behind every input, each row alone in float64; the row is stored as the task asks it."""
    found = [row for row in made(model, tokenizer, {**SPACE, "p_high": 0.6}).values() if "about" in row]
    fates = set()
    for row in found:
        ids, (start, end) = row["input_ids"], row["about"]["input"]
        thing = next(
            word for word in SPACE["slots"]["thing"] if f"a {word}?" in row["messages"][0]["content"]
        )
        head = f"<|im_start|>user\nIs it a {thing}?\n"
        assert tokenizer.decode(ids[:start]) == head, "not the prompt of the task"
        between = "<|im_end|>\n<|im_start|>assistant\n"
        prefix = [*ids[:end], *tokenizer(between, add_special_tokens=False)["input_ids"]]
        c = []
        for label in SPACE["answers"]:
            answer = [*tokenizer(label, add_special_tokens=False)["input_ids"], 3]
            c.append(float(log_p(model, prefix + answer)[len(prefix) - 1 :].mean()))
        p = torch.tensor(c).double().softmax(-1).tolist()
        what, chosen = fate(p, row["row"] % 2, 0.6, 0.0, True)
        label = SPACE["answers"][row["row"] % 2 if chosen is None else chosen]
        assert (row["about"]["fate"], row["about"]["answer"]) == (what, label)
        assert row["about"]["confidence"] == pytest.approx(p[SPACE["answers"].index(label)], abs=1e-5)
        assert row["messages"][1]["content"] == label
        fates.add(what)
        if what == "relabelled":
            assert row["about"]["before"] == SPACE["answers"][row["row"] % 2] != label
    assert "relabelled" in fates, "no label was corrected"


def test_a_stopped_folder_goes_on_to_the_same_bytes(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """What earlier shards said counts after a stop as before it: overlaps, and the histogram."""

    class Stopped(Exception):
        pass

    keys = {**FREE, "max_overlap": 0.05, "filter": {**LOOSE, "ngram": 1}}

    def run(folder: Path, stop_after: int | None = None) -> None:
        maker = pages(tokenizer, keys)
        rows, done = RowsFolder(folder, "key"), 0
        rows.by(lambda: "dense")

        def tell(more: int, tokens: int) -> None:
            nonlocal done
            done += more
            if stop_after is not None and done >= stop_after:
                raise Stopped

        fill(rows, maker, 5, model, tell)

    run(tmp_path / "synthesis")
    (tmp_path / "whole").symlink_to(tmp_path / "synthesis")
    state = read_state(tmp_path / "whole")
    page = synthesis_section(RunFiles(tmp_path))
    assert "answers of the rows that were kept" in page and "what became of their answers" in page
    assert all(f">{fate}<" in page for fate in state.fates) and all(escape(w) in page for w in state.warnings)
    assert state.reasons.get("seen before"), "nothing overlapped"
    kept = state.count("train")
    assert sum(state.answers.values()) == kept == sum(state.fates.values())
    with pytest.raises(Stopped):
        run(tmp_path / "part", stop_after=5)
    run(tmp_path / "part")
    files = {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    for name in files:
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("space", [None, ["yes", "no"]])
def test_an_end_of_several_tokens_leaves_none_of_them(space: Any, tokenizer: Any) -> None:
    """Of a text that ends an input, or an answer, only the last token was left out."""
    keys = {
        **FREE,
        "chat": False,
        "prompt": "Q {verb}{input} A {answer}",
        "until": ["#STOP\n"],
        "answers": space,
    }
    rows: Any = pages(tokenizer, keys).rows
    row = rows[0]
    asked, end = rows.asked(0, keys["prompt"]), [i for part in "#STOP\n" for i in rows.voice.encode(part)]
    said, answer = rows.voice.encode("one two"), rows.voice.encode("three")
    assert len(end) > 3
    given = iter([*asked.head[len(row.ids) :], *said, *end])

    def take(count: int, of: Any) -> bool:
        goes = True
        for _ in range(count):
            assert goes
            token = next(of)
            goes = row.take(token, token)
        return goes

    goes = take(len(asked.head) - len(row.ids) + len(said) + len(end), given)
    assert row.wrote() == [said] if space else goes
    if space is None:
        # the token that ended the input has become the first one between
        assert not take(
            len(asked.between) - 1 + len(answer) + len(end), iter([*asked.between[1:], *answer, *end])
        )
        assert row.wrote() == [answer, said] and row.ids[-1] == rows.schema.end
        ((ids, _),) = row.candidates()
        assert ids == [*asked.head, *said, *asked.between, *answer, rows.schema.end]
    assert rows.before([*said, *rows.voice.encode("#STOP\n")]) == len(said)


def test_collapsed_labels_are_told(tokenizer: Any) -> None:
    maker = pages(tokenizer, SPACE)
    row = {"input_ids": [5, 6, 7], "about": {"input": [0, 3], "answer": "yes", "fate": "sure"}}
    for _ in range(10):
        maker.remember(row)
    told = maker.warnings()
    assert "100% of the rows have one answer ('yes')" in told[0] and "'certainly not'" in told[1]
    free = pages(tokenizer, FREE)
    for word in "abc":
        free.remember({**row, "about": {**row["about"], "answer": word}})
    assert "33% of the rows have one answer" in free.warnings()[0]
    assert not pages(tokenizer, FREE).warnings()


# ------------------------------------------------------------------------------------------------ judged


FATES = [
    ([0.7, 0.3], 0, "sure", 0),
    ([0.3, 0.7], 0, "relabelled", 1),
    ([0.45, 0.4, 0.15], 0, "doubtful", 0),
    ([0.1, 0.4, 0.5], 0, "unlikely answer", None),
    ([0.6], 0, "sure", 0),
    ([0.1], 0, "unlikely answer", None),
]


@pytest.mark.parametrize(("p", "own", "what", "chosen"), FATES)
def test_what_becomes_of_an_answer(p: list[float], own: int, what: str, chosen: int | None) -> None:
    assert fate(p, own, 0.6, 0.2, True) == (what, chosen)
    if what == "relabelled":
        assert fate(p, own, 0.6, 0.2, False) == ("doubtful", own)


def test_rows_of_other_lengths_do_not_change_what_is_said(model: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 4096, (n,), generator=draw).tolist() for n in (3, 17, 9, 2, 30, 8, 5, 4, 11)]
    for row, said in zip(rows, token_log_p(model, rows), strict=True):
        assert torch.allclose(said.double(), log_p(model, row), atol=1e-4)
        assert mean_log_p(said, 1, len(row)) == pytest.approx(float(log_p(model, row).mean()), abs=1e-4)
    assert sum(among([-1.0, -2.0])) == pytest.approx(1) and among([0.0, 0.0]) == [0.5, 0.5]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=1, max_size=8),
    new=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    n=st.integers(1, 4),
    most=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
def test_overlap_is_jaccard_of_ngrams(texts: list[list[int]], new: list[int], n: int, most: float) -> None:
    def grams(ids: list[int]) -> set[tuple[int, ...]]:
        return {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)} or {tuple(ids)}

    near = Overlap(n, most)
    for text in texts:
        near.add(text)
    shares = [len(grams(t) & grams(new)) / len(grams(t) | grams(new)) for t in texts]
    assert near.repeats(new) == any(share > most for share in shares)


# ------------------------------------------------------------------------------------------------ refused


WRONG = [
    ({"prompt": "no place"}, "has {input} 0 times"),
    ({"prompt": "{input} {topic}"}, "names {topic}, which is in no slot"),
    ({"prompt": "{input} {answer}"}, "in a chat it is the assistant's turn"),
    ({"prompt": "{input!r}"}, "a slot is a name in braces"),
    ({"chat": False}, "must end with {answer}"),
    ({"chat": False, "prompt": "{input}{answer}"}, "nothing between {input} and {answer}"),
    ({"slots": {"input": ["x"]}}, "'input' is no slot"),
    ({"write": "{answer}: {input}"}, "add answers"),
    ({"answers": ["a", "b"], "write": "{input}: {answer}"}, "no {answer} before {input}"),
    ({"answers": ["a", "a"]}, "name each once"),
    ({"p_low": 0.9}, "p_low 0.9 above p_high 0.5"),
    ({"perplexity": [9.0, 2.0]}, "give [least, most]"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_a_task_that_cannot_be_asked_is_refused(change: dict[str, Any], words: str) -> None:
    keys = {"kind": "task_labels", "prompt": "Say {input}", **change}
    with pytest.raises(ValueError) as error:
        SYNTHESIS["task_labels"].model_validate(keys)
    assert words in str(error.value)


def test_rows_too_long_for_their_window_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="max_len: got 40; the prompt has up to .* lower input_tokens"):
        pages(tokenizer, FREE, max_len=40)
    config = SYNTHESIS["task_labels"].model_validate(FREE)
    assert (found := config.problem(32)) is not None and found[0] == "input_tokens"


def test_a_task_without_a_template(model: Any, tokenizer: Any) -> None:
    """chat: false: plain text around the input, the answer at the end."""
    keys = {**FREE, "chat": False, "prompt": "def {verb}{input}\n# {answer}"}
    rows = [row for row in made(model, tokenizer, keys).values() if "about" in row]
    assert rows
    for row in rows:
        text = tokenizer.decode(row["input_ids"][:-1])
        assert text == row["text"] and "\n# " in text and "<|im" not in text
        json.dumps(row)
