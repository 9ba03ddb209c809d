"""Reading: every file type, every way a row or a file is bad, and arbitrary bytes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
)

from lowbit_ft.data.batches import Batches
from lowbit_ft.data.errors import DataError
from lowbit_ft.data.examples import load_examples
from lowbit_ft.data.formats import format_of
from lowbit_ft.data.read import TEXT_PIECE, read_rows
from lowbit_ft.recipe.sections.data import DataSection
from tests.data_tools import QUICK, TALK, TINY, load, parts, write


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


# reading


def test_every_file_type_gives_the_same_rows(tokenizer, tmp_path, monkeypatch):
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(7)]
    write(tmp_path, rows)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "rows.jsonl").read_bytes() + b"\n\n")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "nested.json").write_text(json.dumps({"version": 1, "data": rows}))
    (tmp_path / "lines.json").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    (tmp_path / "rows.csv").write_text(
        "prompt,completion\n" + "".join(f'{r["prompt"]},"{r["completion"]}"\n\n' for r in rows)
    )
    (tmp_path / "rows.tsv").write_text(
        "prompt\tcompletion\n" + "".join(f"{r['prompt']}\t{r['completion']}\n" for r in rows)
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows [1].parquet"))
    want = list(load(tmp_path / "rows.jsonl", tokenizer, "completion"))
    files = sorted(f for f in tmp_path.iterdir() if f.is_file())
    assert len(files) == 8
    for file in files:
        assert list(load(file, tokenizer, "completion")) == want, file.name
    assert len(load(tmp_path / "*.?sv", tokenizer, "completion")) == 14
    assert len(load(tmp_path, tokenizer, "completion")) == 8 * 7
    assert list(load(tmp_path / "rows.jsonl", tokenizer, "completion", limit=3)) == want[:3]


def test_chat_from_parquet(tokenizer, tmp_path):
    rows = [{"messages": TALK}, {"messages": TALK[:3]}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert list(load(tmp_path / "rows.parquet", tokenizer)) == list(load(write(tmp_path, rows), tokenizer))


def test_text_files_are_documents_cut_at_line_ends(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("first line\n\nsecond\n")
    (tmp_path / "b.md").write_text("# other\n")
    examples = load(tmp_path, tokenizer, "text")
    assert [tokenizer.decode(e.input_ids) for e in examples] == [
        "first line\n\nsecond\n<|endoftext|>",
        "# other\n<|endoftext|>",
    ]
    line = "x" * 1023 + "\n"
    (tmp_path / "big.txt").write_text(line * (TEXT_PIECE // 1024 + 10))
    rows = list(read_rows(SimpleNamespace(path=str(tmp_path / "big.txt"), limit=None)))
    assert [row.number for row in rows] == [1, TEXT_PIECE // 1024 + 1]
    assert [len(row.value["text"]) for row in rows if row.value] == [TEXT_PIECE, 10 * 1024]


@pytest.mark.parametrize("streaming", [False, True])
def test_hub(tokenizer, tmp_path, monkeypatch, streaming):
    asked = {}

    def load_dataset(path, name, **keys):
        asked.update(path=path, name=name, **keys)
        table = datasets.Dataset.from_list([{"text": "one"}, {"text": None}, {"text": "three"}])
        return table.to_iterable_dataset() if keys["streaming"] else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"path": "who/what", "format": "text", "split": "validation", "name": "big", "revision": "abc"}
    section = DataSection.model_validate(
        {"train": source, "packing": False, "on_bad_row": "skip", "streaming": streaming}
    )
    examples = load_examples(section.train, section, tokenizer)
    assert len(list(iter(examples))) == 2
    assert asked == dict(path="who/what", name="big", split="validation", revision="abc", streaming=streaming)
    assert examples.report.problems == ["hub:who/what[validation]:2: 'text' must be a string; got null"]

    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match="who/what: no local file or folder, and the hub answered ConnectionError: no route$"
    ):
        load_examples(section.train, section, tokenizer)


ASKS = {"role": "user", "content": "q"}
BAD_ROWS = [
    ("chat", b'{"messages": [', "invalid JSON: Expecting value at column"),
    ("chat", b'\xff{"messages": []}', "not UTF-8: byte 0xff at column 1"),
    ("chat", b"[1, 2]", "a row is an object with keys; got a list"),
    ("chat", b"{}", r"key 'messages' \(or 'conversations'\) is missing; the row's keys are: none"),
    ("chat", {"text": "x"}, r"key 'messages' \(or 'conversations'\) is missing; the row's keys are: 'text'"),
    ("chat", {"messages": "hello"}, "'messages' must be a list of messages; got a string"),
    ("chat", {"messages": []}, "'messages' is empty"),
    ("chat", {"messages": [ASKS]}, "no assistant turn to learn from; the roles are: 'user'"),
    ("chat", {"messages": ["hello"]}, r"messages\[0\] must be an object; got a string"),
    ("chat", {"messages": [ASKS, {"content": "x"}]}, r"messages\[1\]: key 'role' is missing"),
    ("chat", {"messages": [ASKS, {"role": "assistant"}]}, r"messages\[1\]: content is missing"),
    ("chat", {"messages": [ASKS, {"role": "assistant", "content": None}]}, r"messages\[1\]: content is null"),
    (
        "chat",
        {"messages": [ASKS, {"role": "assistant", "content": 4}]},
        r"messages\[1\].content must be a string; got a number",
    ),
    (
        "chat",
        {"messages": [ASKS, {"role": "assistant", "content": " "}]},
        r"messages\[1\]: the assistant's content is empty",
    ),
    (
        "chat",
        {"messages": [ASKS, {"role": 1, "content": "x"}]},
        r"messages\[1\].role must be a string; got a number",
    ),
    (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        r"messages\[0\].content has a part that is not text",
    ),
    (
        "chat",
        {"conversations": [{"from": "alien", "value": "x"}]},
        r"conversations\[0\].from is 'alien'; known: system",
    ),
    ("chat", {"messages": TALK, "tools": "hammer"}, "'tools' must be a list of objects; got a string"),
    ("completion", {"prompt": "x"}, "key 'completion' is missing; the row's keys are: 'prompt'"),
    ("completion", {"prompt": 1, "completion": "x"}, "'prompt' must be a string; got a number"),
    ("completion", {"prompt": "x", "completion": ""}, "'completion' is empty"),
    ("alpaca", {"instruction": "x", "input": {}, "output": "y"}, "'input' must be a string; got an object"),
    ("alpaca", {"instruction": "", "output": "y"}, "'instruction' is empty"),
    ("text", {"text": "   "}, "'text' is empty"),
    ("text", {"text": True}, "'text' must be a string; got a boolean"),
    ("text", b'{"text": "a\\ud800"}', "not valid Unicode: a lone surrogate at character 2"),
    ("text", b'{"text": ' + b"[" * 100_000, "invalid JSON"),
    ("text", b'{"text": ' + b"9" * 5000 + b"}", "invalid JSON"),
]
GOOD = {"messages": TALK, "prompt": "a", "completion": "b", "instruction": "c", "output": "d", "text": "e f"}


@pytest.mark.parametrize("format, row, message", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped(format, row, message, tokenizer, tmp_path):
    raw = row if isinstance(row, bytes) else json.dumps(row).encode()
    good = json.dumps(GOOD).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(good + b"\n\n" + raw + b"\n" + good + b"\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: {message}") as caught:
        load(path, tokenizer, format, sequence_len=256)
    assert (caught.value.file, caught.value.row) == (str(path), 3) and "on_bad_row: skip" in str(caught.value)
    examples = load(path, tokenizer, format, sequence_len=256, on_bad_row="skip")
    assert (len(examples), examples.report.rows, examples.report.skipped) == (2, 3, 1)
    assert "1 rows skipped" in str(examples.report) and f"{path}:3: " in str(examples.report)
    path.write_bytes(raw)
    with pytest.raises(DataError, match="no usable row"):
        load(path, tokenizer, format, on_bad_row="skip")


BAD_FILES = [
    ("none.jsonl", None, "none.jsonl: no such file"),
    ("no/such/folder", None, "no such file, folder or hub data set"),
    ("*.jsonl", None, "no file matches"),
    ("nul\0.jsonl", None, "is no path|no such file"),
    ("empty.jsonl", b"", "empty.jsonl: the data set is empty"),
    ("blank.jsonl", b"\n \n", "the data set is empty"),
    ("empty.csv", b"", "the data set is empty"),
    ("header.csv", b"text\n", "the data set is empty"),
    ("rows.pickle", b"x", r"unknown suffix '.pickle'; known: .jsonl"),
    (
        "broken.json",
        b'[{"text": "a"},\n{"text": }]',
        r"broken.json:2: invalid JSON: Expecting value at column 10",
    ),
    ("bytes.json", b'[\n"\xff"]', "bytes.json:2: not UTF-8: byte 0xff"),
    ("number.json", b"3", "expected a list of rows; got a number"),
    ("deep.json", b"[" * 100_000, "invalid JSON"),
    ("item.json", b'[{"text": "a"}, 3]', "item.json:2: a row is an object with keys; got a number"),
    ("fields.csv", b"text,b\nx,1\ny\n", "fields.csv:3: 1 fields; the header has 2"),
    ("quote.csv", b'text,b\n"x"y,1\n', "quote.csv:2: invalid CSV"),
    (
        "bytes.csv",
        b"text\nab\xffc\n",
        "bytes.csv:2: not valid Unicode: byte 0xff is not UTF-8 at character 3",
    ),
    ("bytes.txt", b"good\n\xfe", "bytes.txt:1: not valid Unicode: byte 0xfe"),
    ("broken.parquet", b"PAR1 not really", "not a readable parquet file"),
]


@pytest.mark.parametrize("name, content, message", BAD_FILES)
def test_a_bad_file_is_named(name, content, message, tokenizer, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(path, tokenizer, "text")


def test_empty_folder_and_unreadable_file(tokenizer, tmp_path):
    with pytest.raises(DataError, match="the folder holds no data file"):
        load(tmp_path, tokenizer, "text")
    with pytest.raises(DataError, match=r"data format 'xml'; allowed: chat"):
        format_of("xml", "all", tokenizer)
    with pytest.raises(DataError, match=r"train_on 'me'; allowed"):
        format_of("text", "me", tokenizer)
    source = SimpleNamespace(path=str(write(tmp_path, [GOOD])), format="text")
    with pytest.raises(DataError, match="sequence_len 1; at least 2"):
        load_examples(source, SimpleNamespace(sequence_len=1), tokenizer)  # pyright: ignore


def test_a_long_csv_field_leaves_the_csv_module_as_it_was(tokenizer, tmp_path):
    before = csv.field_size_limit(1000)
    (tmp_path / "long.csv").write_text('text\n"' + "word, " * 40_000 + '"\n')
    examples = load(tmp_path / "long.csv", tokenizer, "text", packing=True)
    assert examples.report.tokens > 40_000 and csv.field_size_limit(before) == 1000


def test_truncation_is_counted_and_a_row_without_target_dropped(tokenizer, tmp_path):
    ask = lambda n: {"role": "user", "content": "why " * n}  # noqa: E731
    answer = {"role": "assistant", "content": "so " * 40}
    path = write(tmp_path, [{"messages": [ask(n), answer]} for n in (1, 10, 200)])
    report = (examples := load(path, tokenizer, sequence_len=32)).report
    assert (report.rows, report.used, report.truncated, report.dropped, report.skipped) == (3, 2, 2, 1, 0)
    assert all(len(e.input_ids) == 32 for e in examples)
    assert "2 rows truncated to 32 tokens" in str(report) and "1 rows dropped" in str(report)
    with pytest.raises(DataError, match="no usable row.*\n.*\n?1 rows dropped"):
        load(write(tmp_path, [{"messages": [ask(200), answer]}]), tokenizer, sequence_len=32)


# fuzz

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
    max_leaves=10,
)
role = (
    st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "function_call", "observation"])
    | st.text(max_size=5)
    | anything
)
message = st.fixed_dictionaries(
    {},
    optional={
        "role": role,
        "content": st.text(max_size=20) | anything,
        "from": role,
        "value": anything,
        "tool_calls": anything,
        "reasoning_content": anything,
        "name": anything,
        "weight": st.sampled_from([0, 1, 0.5, None]) | anything,
        "training": st.booleans() | anything,
        "loss_mask": anything,
        "function_call": anything,
    },
)
some_row = anything | st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(message, max_size=4) | anything,
        "conversations": st.lists(message, max_size=4) | anything,
        "prompt": st.text() | anything,
        "completion": st.text() | anything,
        "instruction": st.text() | anything,
        "input": anything,
        "output": st.text() | anything,
        "text": st.text() | anything,
        "tools": anything | st.text(max_size=10),
        "system": st.text(max_size=10) | anything,
        "history": anything,
        "weight": anything,
    },
)
form = st.sampled_from(["chat", "completion", "alpaca", "text"])


def survives(path: Path, tokenizer: Any, format: str, packing: bool, bad: str, train_on: str) -> None:
    try:
        examples = load(
            path, tokenizer, format, sequence_len=16, packing=packing, on_bad_row=bad, train_on=train_on
        )
    except DataError as error:
        assert str(path.name) in str(error)
        return
    assert len(examples) > 0 and examples.report.used > 0
    for example in examples:
        assert 2 <= len(example.input_ids) <= 16 and any(label != -100 for label in example.labels)
        assert all(labels[0] == -100 for _, labels in parts(example))
    next(Batches(examples, 2, 1))


@settings(QUICK, max_examples=300)
@given(
    rows=st.lists(some_row, max_size=5),
    format=form,
    packing=st.booleans(),
    bad=st.sampled_from(["error", "skip"]),
    train_on=st.sampled_from(["assistant", "completion", "all"]),
    whole=st.booleans(),
)
def test_fuzz_rows(rows, format, packing, bad, train_on, whole, tokenizer, tmp_path):
    path = tmp_path / ("fuzz.json" if whole else "fuzz.jsonl")
    path.write_text(json.dumps(rows) if whole else "\n".join(map(json.dumps, rows)))
    survives(path, tokenizer, format, packing, bad, train_on)


@settings(QUICK, max_examples=200)
@given(
    content=st.binary(max_size=300) | st.text(max_size=200).map(lambda s: s.encode("utf-8", "surrogatepass")),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt"]),
    format=form,
    packing=st.booleans(),
    bad=st.sampled_from(["error", "skip"]),
    head=st.sampled_from([b"", b"text\n", b'{"text": "']),
)
def test_fuzz_bytes(content, suffix, format, packing, bad, head, tokenizer, tmp_path):
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(head + content)
    survives(path, tokenizer, format, packing, bad, "assistant")
