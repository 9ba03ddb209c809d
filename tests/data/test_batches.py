"""Packing checked against the model itself; order, resume and streaming against one plain pass."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
)

from lowbit_ft.data.batches import SHUFFLE_BUFFER, Batches, collate, keeps_segments_apart
from lowbit_ft.data.errors import DataError
from lowbit_ft.data.pack import pack, pack_text
from lowbit_ft.data.windows import Example, Examples
from tests.data_tools import ASSETS, QUICK, TINY, load, parts, write
from tests.toy import equal


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


# packing


def row_lists(longest: int):
    row = st.integers(1, longest).flatmap(
        lambda n: st.tuples(st.lists(st.integers(0, 99), min_size=n, max_size=n), st.integers(0, n))
    )
    return st.lists(row.map(lambda r: Example(r[0], [-100] * r[1] + r[0][r[1] :], [len(r[0])])), max_size=150)


@QUICK
@given(rows=row_lists(16))
def test_pack_keeps_every_row_whole(rows):
    windows = list(pack(rows, 16))
    assert all(0 < len(w.input_ids) <= 16 for w in windows)
    packed = sorted(p for w in windows for p in parts(w))
    assert packed == sorted((tuple(r.input_ids), tuple(r.labels)) for r in rows)
    if len(rows) < 60:  # all windows were open to all rows: no two of them could still be one
        room = sorted(len(w.input_ids) for w in windows)
        assert len(room) < 2 or room[0] + room[1] > 16


@QUICK
@given(rows=row_lists(40), size=st.integers(2, 16))
def test_pack_text_loses_no_token(rows, size):
    windows = list(pack_text(rows, size))
    assert all(len(w.input_ids) == size for w in windows[:-1]) and all(
        len(w.input_ids) <= size for w in windows
    )
    want = [i for r in rows for i in r.input_ids]
    got = [i for w in windows for i in w.input_ids]
    rest = want[len(got) :]
    assert got == want[: len(got)] and len(rest) < size
    for window in windows:
        assert all(labels[0] == -100 for _, labels in parts(window))


def test_packing_fills_the_windows(tokenizer):
    examples = load(
        ASSETS / "docstrings" / "train.jsonl", tokenizer, sequence_len=256, packing=True, limit=600
    )
    report = examples.report
    assert report.tokens / (report.windows * 256) > 0.85
    assert report.rows == 600 == report.used + report.dropped and report.windows == len(examples)
    assert report.target_tokens == sum(label != -100 for e in examples for label in e.labels)
    assert report.tokens == sum(len(e.input_ids) for e in examples)


def test_packed_rows_are_the_padded_rows(tokenizer):
    path = ASSETS / "docstrings" / "valid.jsonl"
    padded = load(path, tokenizer, sequence_len=200)
    packed = load(path, tokenizer, sequence_len=200, packing=True)
    assert sorted(p for e in packed for p in parts(e)) == sorted(p for e in padded for p in parts(e))
    assert len(packed) < len(padded) == padded.report.used
    other = load(path, tokenizer, sequence_len=200, packing=True, seed=1)
    assert [e for e in other] != [e for e in packed]
    assert other.digest != packed.digest == load(path, tokenizer, sequence_len=200, packing=True).digest


# the model and its mask


def windows_for(tokenizer: Any, count: int) -> list[Example]:
    rng = random.Random(0)
    out = []
    for _ in range(count):
        segments = rng.choice([[5, 1, 9, 7], [3, 19], [1, 1, 13], [24], [8, 8, 8]])
        ids = [rng.randrange(4, 4096) for _ in range(sum(segments))]
        out.append(Example(ids, list(ids), segments))
    return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_packed_logits_are_those_of_the_segments_alone(attention, explicit, size, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation=attention)
    windows = windows_for(tokenizer, 3 * size)
    for first in range(0, len(windows), size):
        group = windows[first : first + size]
        batch = collate(group, 1, mask_dtype=torch.float32 if explicit else None)
        assert ("attention_mask" in batch) is explicit
        labels = batch.pop("labels")
        assert labels.shape == batch["input_ids"].shape
        logits = model(**batch, use_cache=False).logits
        for b, window in enumerate(group):
            start = 0
            for length in window.segments:
                ids = torch.tensor([window.input_ids[start : start + length]])
                alone = model(input_ids=ids, use_cache=False).logits[0]
                assert torch.allclose(logits[b, start : start + length], alone, atol=2e-4, rtol=1e-4)
                start += length


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_ignores_positions_is_found_out(attention):
    """OPT builds its mask without position_ids: packed rows would see each other. An explicit mask keeps them
    apart."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
        init_std=0.5,
    )
    opt = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    llama = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16, attn_implementation=attention)
    assert not keeps_segments_apart(opt) and not keeps_segments_apart(opt, 2) and opt.training
    assert keeps_segments_apart(llama, 1) and keeps_segments_apart(llama, 3)
    opt.eval()
    ids = [5, 9, 11, 30, 31, 32, 33]
    packed = Example(ids, ids, [3, 4])
    batch = collate([packed, packed], 1, mask_dtype=torch.float32)
    batch.pop("labels")
    with torch.no_grad():
        logits = opt(**batch, use_cache=False).logits
        position = torch.arange(4)[None]
        alone = opt(input_ids=torch.tensor([ids[3:]]), position_ids=position, use_cache=False).logits
    assert torch.allclose(logits[:, 3:], alone.expand(2, -1, -1), atol=1e-5)


def test_the_loss_never_predicts_across_a_border(tokenizer, tmp_path):
    path = write(tmp_path, [{"text": "alpha beta"}, {"text": "gamma"}, {"text": "delta epsilon " * 30}])
    for packing in (True, False):
        for example in load(path, tokenizer, "text", sequence_len=32, packing=packing):
            assert all(labels[0] == -100 for _, labels in parts(example))
    packed = load(path, tokenizer, "text", sequence_len=32, packing=True)
    whole = [i for e in packed for i in e.input_ids]
    documents = [tokenizer(row)["input_ids"] + [0] for row in ("alpha beta", "gamma", "delta epsilon " * 30)]
    assert whole == sum(documents, [])
    assert packed[0].segments[:2] == [len(documents[0]), len(documents[1])] and packed.report.truncated == 0


# collate


def test_padding(tokenizer):
    long, short = Example([7, 8, 9, 10], [-100, 8, 9, 10], [4]), Example([5, 6], [-100, 6], [1, 1])
    batch = collate([long, short], 1)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 10], [5, 6, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 8, 9, 10], [-100, 6, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    assert {t.dtype for t in batch.values()} == {torch.int64} and set(batch) == {
        "input_ids",
        "labels",
        "position_ids",
    }


# batches


def numbered(count: int) -> Examples:
    return Examples(Example([n, n + 1, n + 2], [-100, n + 1, n + 2], [3]) for n in range(count))


def first_ids(batches: Any, count: int) -> list[list[int]]:
    return [next(batches)["input_ids"][:, 0].tolist() for _ in range(count)]


@QUICK
@given(count=st.integers(1, 23), size=st.integers(1, 5), world=st.integers(1, 4), shuffle=st.booleans())
def test_ranks_together_see_what_one_process_sees(count, size, world, shuffle):
    examples = numbered(count)
    alone = first_ids(Batches(examples, size, 0, 3, shuffle=shuffle), 6 * world)
    ranks = [Batches(examples, size, 0, 3, rank, world, shuffle) for rank in range(world)]
    turns = [first_ids(rank, 6) for rank in ranks]
    assert alone == [turns[r][k] for k in range(6) for r in range(world)]
    assert len({json.dumps(rank.state_dict()) for rank in ranks}) == 1
    # every epoch is every window once
    order = [i for micro_batch in alone for i in micro_batch]
    for start in range(0, len(order) - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))
    if not shuffle:
        assert order == [i % count for i in range(len(order))]


@QUICK
@given(count=st.integers(1, 40), size=st.integers(1, 4), stop=st.integers(0, 60), seed=st.integers(0, 9))
def test_resume_is_bit_equal(count, size, stop, seed):
    examples = numbered(count)
    straight = Batches(examples, size, 0, seed)
    for _ in range(stop):
        next(straight)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = Batches(numbered(count), size, 0, seed)
    next(resumed)
    resumed.load_state_dict(state)
    assert all(equal(next(straight), next(resumed)) for _ in range(8))
    assert straight.state_dict() == resumed.state_dict()


@QUICK
@given(count=st.integers(1, 23), size=st.integers(1, 5), world=st.integers(1, 3), steps=st.integers(0, 9))
def test_batches_carry_the_numbers_of_their_windows_when_asked(count, size, world, steps):
    """By which a teacher's words are found; `first` knows beforehand which ones so many steps see."""
    examples, seen = numbered(count), set()
    for rank in range(world):
        plain, told = (Batches(examples, size, 0, 3, rank, world, taught=n) for n in (False, True))
        for _ in range(steps):
            batch, same = next(told), next(plain)
            windows = batch.pop("windows")
            assert batch.pop("used").tolist() == [3] * size
            assert windows.tolist() == batch["input_ids"][:, 0].tolist() and equal(batch, same)
            seen |= set(windows.tolist())
        state = json.dumps(told.state_dict())
        assert told.first(steps * size * world) == Batches(examples, 9, 0, 3).first(steps * size * world)
        assert json.dumps(told.state_dict()) == state == json.dumps(plain.state_dict())
        for batch, same in zip(told.one_epoch(), plain.one_epoch(), strict=True):
            assert batch.pop("used").tolist() == [3] * len(batch["labels"])
            assert batch.pop("windows").tolist() == batch["input_ids"][:, 0].tolist() and equal(batch, same)
    assert told.first(steps * size * world) == sorted(seen)


def test_resume_in_other_data_is_refused():
    state = Batches(numbered(9), 2, 0, 1).state_dict()
    for other in (
        Batches(numbered(8), 2, 0, 1),
        Batches(numbered(9), 2, 0, 2),
        Batches(numbered(9), 2, 0, 1, shuffle=False),
    ):
        with pytest.raises(DataError, match="cannot resume: (digest|seed|shuffle) was"):
            other.load_state_dict(state)


def test_len_seed_and_one_epoch():
    examples = numbered(10)
    assert [len(Batches(examples, 3, 0, world=w)) for w in (1, 2)] == [4, 2]
    assert first_ids(Batches(examples, 10, 0, 0), 2) != first_ids(Batches(examples, 10, 0, 1), 2)
    batches = Batches(examples, 10, 0)
    a, b = first_ids(batches, 2)
    assert a != b and a != list(range(10))  # each epoch has its own order
    state = batches.state_dict()
    both = [Batches(examples, 3, 0, rank=r, world=2).one_epoch() for r in (0, 1)]
    got = [batch["input_ids"][:, 0].tolist() for rank in both for batch in rank]
    assert got == [[0, 1, 2], [6, 7, 8], [3, 4, 5], [9]] and batches.state_dict() == state
    with pytest.raises(DataError, match="micro_batch_size 0"):
        Batches(examples, 0, 0)
    with pytest.raises(DataError, match="no examples"):
        Batches(Examples([]), 1, 0)


def test_examples_is_a_sequence():
    examples = numbered(5)
    assert examples[-1] == examples[4] == examples[3:][1] and len(list(examples)) == 5
    with pytest.raises(IndexError):
        examples[5]


# streaming


def test_stream_is_the_file(tokenizer):
    path = ASSETS / "docstrings" / "valid.jsonl"
    for format, packing in (("chat", False), ("chat", True)):
        held = load(path, tokenizer, format, packing=packing, sequence_len=128)
        stream = load(path, tokenizer, format, packing=packing, sequence_len=128, streaming=True)
        assert stream.streaming and not held.streaming
        got = list(iter(stream))
        if packing:  # packed in file order there, in a seeded order here
            assert sorted(p for e in got for p in parts(e)) == sorted(p for e in held for p in parts(e))
        else:
            assert got == list(held) and str(stream.report) == str(held.report)
        assert (stream.report.used, stream.report.truncated) == (held.report.used, held.report.truncated)
    for unable in (lambda: len(stream), lambda: stream[0], lambda: len(Batches(stream, 1, 0))):
        with pytest.raises(DataError, match="streamed data set has no"):
            unable()


def test_stream_shuffles_within_a_bounded_buffer_and_resumes(tokenizer, tmp_path):
    count = SHUFFLE_BUFFER + 70
    path = write(tmp_path, [{"text": f"{n} and on"} for n in range(count)])

    def batches(world: int = 1, rank: int = 0, shuffle: bool = True) -> Batches:
        stream = load(path, tokenizer, "text", streaming=True, sequence_len=32)
        return Batches(stream, 5, 1, 7, rank, world, shuffle)

    steps = count // 5 * 2 + 9  # into the third epoch
    straight = batches()
    seen, states = [], []
    for _ in range(steps):
        states.append(json.loads(json.dumps(straight.state_dict())))
        seen.append(next(straight))
    texts = [tokenizer.decode(ids[ids != 1]) for b in seen for ids in b["input_ids"]]
    epoch = [int(t.split()[0]) for t in texts[:count]]
    assert sorted(epoch) == list(range(count)) and epoch != sorted(epoch)
    assert all(n <= place + SHUFFLE_BUFFER for place, n in enumerate(epoch))
    assert (
        sorted(texts[count : 2 * count]) == sorted(texts[:count])
        and texts[count : 2 * count] != texts[:count]
    )
    for stop in random.Random(0).sample(range(steps - 1), 6):
        resumed = batches()
        resumed.load_state_dict(states[stop])
        assert equal(next(resumed), seen[stop])
    pair = [batches(2, r) for r in (0, 1)]
    assert all(equal(next(pair[k % 2]), seen[k]) for k in range(20))
    few = Batches(load(path, tokenizer, "text", streaming=True, limit=20), 20, 1)  # all of them in the buffer
    order = [tokenizer.decode(ids[ids != 1]) for ids in next(few)["input_ids"]]
    assert [int(t.split()[0]) for t in order] != list(range(20)) == sorted(int(t.split()[0]) for t in order)
    plain = next(batches(shuffle=False))
    assert tokenizer.decode(plain["input_ids"][0]).startswith("0 and on")


def test_windows_of_a_stream_have_no_numbers(tokenizer):
    stream = load(ASSETS / "docstrings" / "train.jsonl", tokenizer, streaming=True, limit=4)
    assert set(next(Batches(stream, 1, 0, taught=True))) == {"input_ids", "labels", "position_ids", "used"}
    with pytest.raises(DataError, match="has no length"):
        Batches(stream, 1, 0).first(3)


def test_stream_reports_the_bad_row_when_it_comes(tokenizer, tmp_path):
    path = write(tmp_path, [{"text": "fine"}, {"text": "fine too"}, {"text": 3}])
    stream = load(path, tokenizer, "text", streaming=True)
    batches = Batches(stream, 2, 0, shuffle=False)
    next(batches)
    with pytest.raises(DataError, match=r"rows.jsonl:3: 'text' must be a string; got a number"):
        next(batches)
    with pytest.raises(DataError, match="empty"):
        load(write(tmp_path, []), tokenizer, "text", streaming=True)
