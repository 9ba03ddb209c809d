"""Several sources: which rows an epoch has, in which order, and what of them makes no mixture."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lowbit_ft.data.batches import Batches
from lowbit_ft.data.errors import DataError
from lowbit_ft.data.examples import load_examples
from lowbit_ft.data.mix import mixed
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.recipe.sections.data import DataSection
from tests.data_tools import QUICK, TINY, write

TEXT = {"sequence_len": 64, "packing": False}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(TINY))


def sources(folder: Path, **counts: int) -> list[dict[str, Any]]:
    """A file per name with so many rows, "a 0", "a 1", ..."""
    found = []
    for name, count in counts.items():
        rows = [{"prompt": "", "completion": f"{name} {i}"} for i in range(count)]
        found.append({"path": str(write(folder, rows, f"{name}.jsonl")), "format": "completion"})
    return found


def loaded(tokenizer: Any, train: Any, seed: int = 0, **keys: Any) -> Examples:
    section = DataSection.model_validate({"train": train, **TEXT, **keys})
    return load_examples(section.train, section, tokenizer, seed=seed)


def said(tokenizer: Any, windows: Any) -> list[str]:
    """The texts of windows, a row each."""
    return [tokenizer.decode(w.input_ids, skip_special_tokens=True).strip() for w in windows]


@QUICK
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=2, max_size=4),
    st.sampled_from(["first_exhausted", "all_exhausted"]),
)
def test_every_stretch_has_the_shares_and_an_epoch_ends_as_said(given_rows, stopping) -> None:
    counts, weights = zip(*given_rows, strict=True)
    asked = [SimpleNamespace(path=str(i), weight=w) for i, w in enumerate(weights)]
    rows = [lambda turn, n=n: iter(range(n)) for n in counts]
    epoch = list(mixed(asked, rows, stopping))
    taken = [0] * len(counts)
    for length, (i, row) in enumerate(epoch, 1):
        assert row == taken[i] % counts[i]  # in order, and from the start again
        taken[i] += 1
        assert all(abs(t - length * w / sum(weights)) < 2 for t, w in zip(taken, weights, strict=True))
    ended = [t >= n for t, n in zip(taken, counts, strict=True)]
    last = epoch[-1][0]
    assert taken[last] == counts[last]  # the row that ended it is the last of a source
    if stopping == "all_exhausted":
        assert all(ended)
    else:
        assert sum(ended) == 1


def test_without_weights_every_row_stands_in_an_epoch_once(tokenizer: Any, tmp_path: Path) -> None:
    train = sources(tmp_path, a=7, b=2, c=3)
    wanted = {f"{name} {i}" for name, n in (("a", 7), ("b", 2), ("c", 3)) for i in range(n)}
    for packing in (False, True):
        examples = loaded(tokenizer, train, packing=packing)
        assert examples.report.rows == examples.report.used == 12 and not examples.report.left
    held = said(tokenizer, loaded(tokenizer, train))
    assert set(held) == wanted and len(held) == 12
    assert [text[0] for text in held] != sorted(text[0] for text in held)  # one beside the other
    stream = said(tokenizer, loaded(tokenizer, train, streaming=True))
    assert stream[:7] == ["a 0", "b 0", "c 0", "a 1", "b 1", "c 1", "a 2"] and set(stream) == wanted


def test_weights_are_shares_of_the_rows_of_an_epoch(tokenizer: Any, tmp_path: Path) -> None:
    train = sources(tmp_path, a=20, b=4)
    train[0]["weight"], train[1]["weight"] = 3, 1
    examples = loaded(tokenizer, train)
    held = said(tokenizer, examples)
    assert Counter(text[0] for text in held) == {"a": 11, "b": 4} and len(set(held)) == 15
    assert said(tokenizer, loaded(tokenizer, train, seed=1)) != held  # other rows of a, another order
    assert {t for t in held if t[0] == "a"} != {f"a {i}" for i in range(11)}
    report = str(examples.report)
    assert "15 of 24 rows used" in report and "9 rows are in no epoch" in report
    assert "a.jsonl (completion): 11 rows of an epoch (73.3 %), chosen from 20, weight 3" in report
    repeated = loaded(tokenizer, train, stopping_strategy="all_exhausted")
    counts = Counter(said(tokenizer, repeated))
    assert all(counts[f"a {i}"] == 1 for i in range(20))
    assert {counts[f"b {i}"] for i in range(4)} == {1, 2} and repeated.report.used == 24
    assert "its 4 about 1.5 times each, weight 1" in str(repeated.report)
    stream = loaded(tokenizer, train, stopping_strategy="all_exhausted", streaming=True)
    assert Counter(text[0] for text in said(tokenizer, stream)) == {"a": 20, "b": 6}
    assert stream.report.rows == 24  # what is read again is counted once


def test_one_source_in_a_list_is_the_source(tokenizer: Any, tmp_path: Path) -> None:
    (plain,) = sources(tmp_path, a=9)
    alone = DataSection.model_validate({"train": [{**plain, "weight": 2}]})
    assert alone == DataSection.model_validate({"train": plain})
    assert alone.model_dump() == DataSection.model_validate({"train": plain}).model_dump()
    for keys in ({"packing": True}, {"streaming": True}):
        assert loaded(tokenizer, [plain], **keys).digest == loaded(tokenizer, plain, **keys).digest


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_is_resumed_bit_for_bit(streaming: bool, tokenizer: Any, tmp_path: Path) -> None:
    train = sources(tmp_path, a=9, b=3)
    train[0]["weight"], train[1]["weight"] = 2, 1
    keys = {"streaming": streaming, "packing": True, "sequence_len": 16, "stopping_strategy": "all_exhausted"}

    def batches() -> Batches:
        return Batches(loaded(tokenizer, train, 5, **keys), 2, pad_id=0, seed=5)

    whole = batches()
    wanted, states = [], []
    for _ in range(9):
        states.append(whole.state_dict())
        wanted.append(next(whole))
    assert whole.state_dict()["epoch"] > 0
    for step, state in enumerate(json.loads(json.dumps(states))):
        again = batches()
        again.load_state_dict(state)
        for got, want in zip(islice(again, 2), wanted[step:], strict=False):
            assert all(torch.equal(got[key], want[key]) for key in want)
    train[0]["weight"] = 20
    with pytest.raises(DataError, match="cannot resume: digest"):
        batches().load_state_dict(states[3])


def test_texts_are_joined_and_a_bad_row_has_its_file_and_line(tokenizer: Any, tmp_path: Path) -> None:
    texts = [
        {"path": str(write(tmp_path, [{"text": f"{n} " * 30}] * 4, f"{n}.jsonl")), "format": "text"}
        for n in "ab"
    ]
    joined: list[Example] = list(loaded(tokenizer, texts, packing=True))
    assert all(len(window.input_ids) == 64 for window in joined[:-1])
    chats = {"path": str(write(tmp_path, [{"messages": [{"role": "user"}]}], "c.jsonl")), "format": "chat"}
    train = [*sources(tmp_path, d=2), chats]
    with pytest.raises(DataError, match=r"c\.jsonl:1: "):
        loaded(tokenizer, train)
    with pytest.raises(DataError, match=r"c\.jsonl: no usable row; mend its rows"):
        loaded(tokenizer, train, on_bad_row="skip")
    with pytest.raises(DataError, match="texts are joined and cut"):
        loaded(tokenizer, [*texts, *sources(tmp_path, d=2)], packing=True)
    assert len(loaded(tokenizer, [*texts, *sources(tmp_path, d=2)])) == 10  # a row a window: they go together
    pair = {"path": texts[0]["path"], "format": "preference"}
    with pytest.raises(DataError, match="rows of two answers beside rows of one"):
        loaded(tokenizer, [pair, *sources(tmp_path, d=2)])
    train = sources(tmp_path, d=2, e=2)
    train[0]["weight"] = 1
    with pytest.raises(DataError, match=r"got a weight for .*d\.jsonl and none for .*e\.jsonl"):
        loaded(tokenizer, train)
