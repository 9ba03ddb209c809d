"""Rows of two answers: what becomes of each layout, beside trl's rule for where an answer begins; what is
refused and counted; and how pairs are packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lowbit_ft.data.errors import DataError
from tests.data_tools import TINY, load, targets, write

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}]
GOOD, BAD = [{"role": "assistant", "content": "Four."}], [{"role": "assistant", "content": "Five, I think."}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def test_turns(tokenizer: Any, tmp_path: Path) -> None:
    """Token for token what trl makes: the prompt with its generation prompt, all behind it is the answer."""
    path = write(tmp_path, [{"prompt": PROMPT, "chosen": GOOD, "rejected": BAD, "score": 3}])
    examples = load(path, tokenizer, "preference", sequence_len=256)
    (pair,) = examples
    assert targets(tokenizer, pair) == ["Four.<|im_end|>\n", "Five, I think.<|im_end|>\n"]
    sizes = []
    for answer in (GOOD, BAD):
        asked = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(PROMPT + answer)["input_ids"]
        assert whole[: len(asked)] == asked
        sizes.append(len(whole))
        start = sum(sizes) - len(whole)
        assert pair.input_ids[start : start + len(whole)] == whole
        learned = [label != -100 for label in pair.labels[start : start + len(whole)]]
        assert learned == [False] * len(asked) + [True] * (len(whole) - len(asked))
    assert pair.segments == sizes
    assert examples.report.unread == {"score": 1}


def test_text(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "2+2 is", "chosen": " four", "rejected": " five"}])
    (pair,) = load(path, tokenizer, "preference", sequence_len=256)
    assert targets(tokenizer, pair) == [" four<|endoftext|>", " five<|endoftext|>"]
    (alone,) = load(path, tokenizer, "chosen", sequence_len=256)
    assert alone.input_ids == pair.input_ids[: pair.segments[0]] and len(alone.segments) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
        {"prompt": "What is 2+2?", "chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
        {"prompt": None, "chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
    ],
)
def test_a_prompt_that_both_answers_begin_with(row: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    """As in hub data sets that have it twice, or not at all."""
    explicit = write(tmp_path, [{"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}], "explicit.jsonl")
    found = load(write(tmp_path, [row]), tokenizer, "preference", sequence_len=256)
    assert list(found) == list(load(explicit, tokenizer, "preference", sequence_len=256))


def test_a_prompt_within_text_ends_before_a_space(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"chosen": "2+2 is four", "rejected": "2+2 is seven"}]
    (pair,) = load(write(tmp_path, rows), tokenizer, "preference", sequence_len=256)
    assert targets(tokenizer, pair) == [" four<|endoftext|>", " seven<|endoftext|>"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": GOOD}, "'chosen' is a string and 'rejected' a list"),
        ({"prompt": "a", "chosen": GOOD, "rejected": BAD}, "'prompt' is a string and the answers are a list"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "nothing is preferred"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "'chosen' is empty behind the prompt"),
        ({"chosen": "ab", "rejected": "cd"}, "the prompt is empty"),
        ({"prompt": [], "chosen": GOOD, "rejected": BAD}, "the prompt is empty"),
        ({"prompt": PROMPT, "chosen": [], "rejected": BAD}, "'chosen' is empty"),
        ({"prompt": PROMPT, "chosen": [{**GOOD[0], "weight": 1}], "rejected": BAD}, "compared whole"),
        ({"prompt": PROMPT, "chosen": [{"role": "assistant"}], "rejected": BAD}, "content is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": 4}, "'rejected' must be a string; got a number"),
    ],
)
def test_refused(row: dict[str, Any], message: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, [row]), tokenizer, "preference", sequence_len=256)


def test_long_answers_are_cut_to_half_a_window_and_long_prompts_are_left_out(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "a b c", "chosen": " d" * 40, "rejected": " e"},
        {"prompt": "a " * 40, "chosen": " b", "rejected": " c"},
    ]
    examples = load(write(tmp_path, rows), tokenizer, "preference", sequence_len=32)
    assert [example.segments[0] for example in examples] == [16]
    assert (examples.report.truncated, examples.report.dropped, examples.report.used) == (1, 1, 1)


def test_pairs_share_windows_whole(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} is", "chosen": " one" * (1 + i % 4), "rejected": " two"} for i in range(30)]
    path = write(tmp_path, rows)
    single = load(path, tokenizer, "preference", sequence_len=64)
    packed = load(path, tokenizer, "preference", sequence_len=64, packing=True)
    assert len(single) == 30 > 2 * len(packed) and packed.report.used == 30
    cut = []
    for window in packed:
        assert len(window.segments) % 2 == 0 and len(window.input_ids) <= 64
        at = 0
        for a, b in zip(window.segments[::2], window.segments[1::2], strict=True):
            cut.append((window.input_ids[at : at + a + b], window.labels[at : at + a + b]))
            at += a + b
    assert sorted(cut) == sorted((pair.input_ids, pair.labels) for pair in single)


def test_a_template_that_writes_the_prompt_otherwise_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    other = AutoTokenizer.from_pretrained(TINY)
    other.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    path = write(tmp_path, [{"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}])
    with pytest.raises(DataError, match="where the answer begins cannot be told; use a template"):
        load(path, other, "preference", sequence_len=256)
