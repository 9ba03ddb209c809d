"""An encode of rows that was killed goes on behind the rows that are done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lowbit_ft import pipeline
from lowbit_ft.stages import speak as stage
from lowbit_ft.stages.begun import Begun

ASSETS = Path(__file__).resolve().parents[2] / "recipes" / "assets"
COUNT = 4


def test_an_encode_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a line perhaps; with the same bytes. What another codec or another sound would make is
    made anew."""
    rows = [json.loads(line) for line in (ASSETS / "speech" / "valid.jsonl").read_text().splitlines()[:COUNT]]
    rows = [row | {"audio": str(ASSETS / "speech" / row["audio"])} for row in rows]
    data, output = tmp_path / "data.jsonl", tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    wanted = (ASSETS / "speech" / "speak-valid.jsonl").read_bytes().splitlines(keepends=True)[:COUNT]
    begun, plain, asked = tmp_path / "rows.jsonl.begun", stage.encode, list[int]()
    codec = ASSETS / "speech-codec"

    def killed(model: Any, frames: Tensor) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        return counted(model, frames)

    def counted(model: Any, frames: Tensor) -> Any:
        asked.append(len(frames))
        return plain(model, frames)

    monkeypatch.setattr(stage, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.encode(codec, data, output)
    assert not output.exists() and len(begun.read_bytes().splitlines()) == 2
    first, second = begun.read_bytes().splitlines(keepends=True)
    begun.write_bytes(first + second[:-9])
    monkeypatch.setattr(stage, "encode", counted)
    pipeline.encode(codec, data, output)
    assert len(asked) == 2 + COUNT - 1 and not begun.exists()
    assert output.read_bytes() == b"".join(wanted)
    other = json.loads(first) | {"of": "0" * 64}
    begun.write_text(json.dumps(other) + "\n")
    with Begun(output, 1 << 14), pytest.raises(ValueError, match="another process writes it"):
        pipeline.encode(codec, data, output)
    begun.write_text(json.dumps(other) + "\n")
    pipeline.encode(codec, data, output)
    assert output.read_bytes() == b"".join(wanted)
    for wrong in ("no line of it\n", json.dumps(other | {"codes": [1 << 20]}) + "\n"):
        begun.write_text(wrong)
        with pytest.raises(ValueError, match="begun:1: is no line that encode wrote.*move the file"):
            pipeline.encode(codec, data, output)
        assert begun.read_text() == wrong
