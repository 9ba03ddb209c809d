"""Write the tables of docs/data.md: what the readers of lowbit_ft/data/ read, from the tables they read by.

    python -m benchmarks.data_table

`make docs` runs it; tests/docs/test_data_page.py fails while the page says something else.
"""

from __future__ import annotations

from pathlib import Path

from datasets.data_files import SPLIT_KEYWORDS

from lowbit_ft.data.columns import ROLES, TURN_KEYS
from lowbit_ft.data.formats import FORMATS
from lowbit_ft.data.read import READERS
from lowbit_ft.files.atomic import write_text

PAGE = Path(__file__).resolve().parent.parent / "docs" / "data.md"


def columns() -> list[str]:
    rows = ["| `format` | column | what becomes of it |", "| --- | --- | --- |"]
    return rows + [
        f"| `{f}` | `{name}` | {what} |" for f, kind in FORMATS.items() for name, what in kind.columns.items()
    ]


def turns() -> list[str]:
    coded = [(", ".join(f"`{key}`" for key in keys.split(", ")), what) for keys, what in TURN_KEYS.items()]
    return [
        "| keys of a turn | what they do |",
        "| --- | --- |",
        *(f"| {keys} | {what} |" for keys, what in coded),
    ]


def roles() -> list[str]:
    by_role: dict[str, list[str]] = {}
    for theirs, ours in ROLES.items():
        by_role.setdefault(ours, []).append(f"`{theirs}`")
    return [
        "| role | `from` |",
        "| --- | --- |",
        *(f"| `{r}` | {', '.join(names)} |" for r, names in by_role.items()),
    ]


def splits() -> list[str]:
    rows = ["| `split` | a word in the name of the file or of its folder |", "| --- | --- |"]
    return rows + [f"| `{s}` | {', '.join(f'`{w}`' for w in words)} |" for s, words in SPLIT_KEYWORDS.items()]


def suffixes() -> list[str]:
    return [", ".join(f"`{suffix}`" for suffix in READERS)]


BLOCKS = {"columns": columns, "turns": turns, "roles": roles, "splits": splits, "suffixes": suffixes}


def render(page: str) -> str:
    """The page with its generated blocks made anew: from "<!-- name -->" to "<!-- /name -->"."""
    for name, make in BLOCKS.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found, rest = page.partition(start)
        assert found and end in rest, f"{PAGE.name} has no block {name}"
        page = f"{before}{start}\n" + "\n".join(make()) + f"\n\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    write_text(PAGE, render(PAGE.read_text(encoding="utf-8")))
    print(f"wrote {PAGE}")
