"""docs/data.md: its tables are those the readers read by, and its claims are the program's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import yaml

from benchmarks import data_table
from lowbit_ft.data.columns import LEARN_KEYS, ROLES, TURN_KEYS, unread
from lowbit_ft.data.formats import FORMATS
from lowbit_ft.data.windows import DataReport, Share
from lowbit_ft.recipe.sections.data import DataSection

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_the_tables_are_what_the_readers_read() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert data_table.render(text) == text, "run: python -m benchmarks.data_table"
    for name, kind in FORMATS.items():
        assert kind.columns, f"{name} reads no column"
        assert all(f"| `{name}` | `{column}` |" in text for column in kind.columns)
    assert all(f"`{name}`" in text for name in ROLES)
    assert all(f"`{name}`" in text for keys in TURN_KEYS for name in keys.split(", "))
    assert set(LEARN_KEYS) <= {key for keys in TURN_KEYS for key in keys.split(", ")}


def test_the_lines_of_the_report_read_so() -> None:
    text = PAGE.read_text(encoding="utf-8")
    (left_out,) = re.findall(r"`(\d rows are not written whole[^`]*)`", text)
    (columns,) = re.findall(r"`(columns not read: [^`]*)`", text)
    lost = {"tools": 2, "system content": 1}
    report = DataReport(incomplete=3, lost=lost, unread=dict.fromkeys(("id", "source"), 4000))
    assert left_out in str(report) and columns in str(report)
    assert unread({"text": "a", "id": 1, "source": "b"}, FORMATS["text"].columns.keys()) == ["id", "source"]


def test_the_mixture_of_the_page_is_one() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## Several sources")[2].partition("\n## ")[0]
    (written,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    section = DataSection.model_validate(yaml.safe_load(written)["data"])
    assert isinstance(section.train, list) and [source.weight for source in section.train] == [3, 1]
    field = DataSection.model_fields["stopping_strategy"]
    assert all(f"`{word}`" in text for word in get_args(field.annotation))
    (line,) = re.findall(r"`(\S+ \(chat\): [^`]*)`", text)
    sources = [Share("chats.jsonl (chat)", 3, 300, 1000), Share("other", 1, 100, 100)]
    assert line in str(DataReport(sources=sources))
