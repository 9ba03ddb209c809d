"""Files that a stranger wrote: regular ones only, bounded, and of the shape that was asked, or one message
with the file's name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lowbit_ft.files.jsonfile import MAX_DEPTH, read_json
from lowbit_ft.files.records import Environment, Evaluation, StageTime
from lowbit_ft.files.regular import MAX_CARD, irregular, open_regular, read_card, read_regular
from lowbit_ft.files.tensorfile import CheckpointError, read_header

BAD_JSON: dict[str, tuple[bytes, Any, str]] = {
    "cut": (b'{"a": [1, 2', Any, r"not JSON \(Expecting.*cut or damaged"),
    "empty": (b"", Any, "not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', Any, "byte 0xff is not UTF-8"),
    "far too deep": (b"[" * 100_000, Any, f"nested deeper than {MAX_DEPTH} levels"),
    "too deep": (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), Any, f"deeper than {MAX_DEPTH} levels"),
    "a number too long": (b"9" * 5000, Any, "thousands of digits"),
    "half a character": (rb'{"a": "\ud800"}', Any, "half a surrogate pair"),
    "null for an object": (b"null", Environment, "got None; allowed: an object"),
    "a list of numbers": (b"[1]", list[StageTime], "0: got 1; allowed: an object"),
    "a row edited": (
        b'{"rows": [{"stage": "base", "loss": "x", "perplexity": 1, "kl": null, "tokens": 1}]}',
        Evaluation,
        "rows.0.loss: got 'x'; allowed: a number",
    ),
    "a key too many": (
        b'{"rows": [{"stage": "base", "loss": 1, "perplexity": 1, "kl": null, "tokens": 1, "b": 1}]}',
        Evaluation,
        "rows.0.b: unknown key",
    ),
    "a key missing": (b'[{"stage": "train", "seconds": 1}]', list[StageTime], "0.peak_memory_gb: missing"),
    "true for a number": (
        b'[{"stage": "train", "seconds": true, "peak_memory_gb": 1}]',
        list[StageTime],
        "0.seconds: got True; allowed: a number",
    ),
}


@pytest.mark.parametrize("case", list(BAD_JSON))
def test_bad_json_is_one_message_with_the_file(case: str, tmp_path: Path) -> None:
    data, shape, message = BAD_JSON[case]
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.json: .*{message}"):
        read_json(path, shape)


def test_what_is_within_the_bounds_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    deep = b"[" * (MAX_DEPTH - 1) + b"1" + b"]" * (MAX_DEPTH - 1)
    path.write_bytes(deep)
    assert read_json(path) is not None
    path.write_bytes(b'\xef\xbb\xbf{"a": Infinity, "b": "\xc3\xa4"}')
    assert read_json(path) == {"a": float("inf"), "b": "ä"}
    path.write_bytes(b'{"revision": null, "python": "3.11"}')
    assert read_json(path, Environment).revision is None
    with pytest.raises(ValueError, match=r"got \d+ bytes; allowed: at most 10"):
        read_json(path, limit=10)
    with pytest.raises(ValueError, match=r"y\.json: missing; put it there"):
        read_json(tmp_path / "y.json", fix="put it there")


def test_pipes_devices_and_folders_are_not_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "model.safetensors"
    os.mkfifo(pipe)  # opening it for reading would wait for ever
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path, what in ((pipe, "a pipe"), (tmp_path / "zero", "a device"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=rf"{path.name}: got {what}"):
            open_regular(path)
        with pytest.raises(ValueError, match=f"got {what}"):
            read_json(path)
    with pytest.raises(CheckpointError, match="got a pipe"):
        read_header(pipe)
    header = b'{"a": {"dtype": {"": null}, "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "odd").write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    with pytest.raises(CheckpointError, match="damaged header entry of tensor 'a'"):
        read_header(tmp_path / "odd")
    assert irregular(pipe) == "a pipe (FIFO)" and irregular(tmp_path) is None
    assert irregular(tmp_path / "nothing") is None
    (tmp_path / "file").write_bytes(b"abc")
    assert read_regular(tmp_path / "file", 3) == b"abc" and irregular(tmp_path / "file") is None


def test_a_card_is_text_of_some_size(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# a model \N{GREEK SMALL LETTER ALPHA}", encoding="utf-8")
    assert read_card(card) == card.read_text(encoding="utf-8")
    card.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="README.md: not UTF-8 text"):
        read_card(card)
    with card.open("wb") as file:
        file.truncate(MAX_CARD + 1)  # sparse
    with pytest.raises(ValueError, match="README.md.*at most"):
        read_card(card)
