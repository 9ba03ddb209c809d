"""The rows of a model in the report: the manifest of a stranger names no file of somebody else."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lowbit_ft.report.files import RunFiles
from lowbit_ft.report.synthesis import synthesis_section


def section(folder: Path, **shard: Any) -> str:
    (folder / "synthesis" / "train").mkdir(parents=True, exist_ok=True)
    (folder / "synthesis" / "lowbit_ft.json").write_text(json.dumps({"by": "dense", "shards": {"0": shard}}))
    return synthesis_section(RunFiles(folder))


def test_what_lies_elsewhere_is_not_shown(tmp_path: Path) -> None:
    file = BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    (tmp_path / "mine.png").write_bytes(file.getvalue())
    (tmp_path / "mine.jsonl").write_text('{"text": "a secret"}\n')
    run = tmp_path / "run"
    away = {"train/../../../mine.jsonl": {}, "train/../../../mine.png": {}, str(tmp_path / "mine.png"): {}}
    page = section(run, rows={"train": 1}, files=away)
    assert "secret" not in page and base64.b64encode(file.getvalue()).decode() not in page
    (run / "synthesis" / "train" / "0.jsonl").write_text('{"text": "its own"}\n')
    assert "its own" in section(run, rows={"train": 1}, files={**away, "train/0.jsonl": {}})


def test_a_bar_is_a_share(tmp_path: Path) -> None:
    """Of counts below zero the sum is less than a part: a bar of 10**270 signs."""
    (tmp_path / "synthesis").mkdir()
    facts = {
        "shards": {"0": {"rows": {"train": 4}}},
        "answers": {"yes": 3, "no": 1, "a": 2**900, "b": -(2**900)},
    }
    (tmp_path / "synthesis" / "lowbit_ft.json").write_text(json.dumps(facts))
    assert synthesis_section(RunFiles(tmp_path)).count("#") <= 42


@pytest.mark.parametrize("files", [5, ["train/0.jsonl"], None, "train"])
def test_files_that_are_no_table_cost_only_the_rows(tmp_path: Path, files: Any) -> None:
    assert "1 rows" in section(tmp_path, rows={"train": 1}, files=files)
