"""Write what the pages of docs/ say about the tree from the tree: the map of the files, the list of commands.

    python docs/write_pages.py       # or `make docs`, which also draws the house

A file is described once, by the first sentence of its docstring (of its first comment, for a recipe), and the
map of docs/architecture.md is those sentences. A command is described by its own --help, and the table of
docs/commands.md is that. tests/docs/test_readme.py fails while a page says something else.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# What the map lists, in its order: a folder and the files in it that count.
PARTS = (
    ("lowbit_ft", "**/*.py"),
    ("kernels", "**/*.py"),
    ("benchmarks", "**/*.py"),
    ("recipes", "*.yaml"),
    ("docs", "*.py"),
)


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence: one before a capital letter, a quote or the end of the
    paragraph.
    """
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"\.(?=\s+[A-Z`\"'(\[])|[.:]$", paragraph)[0]


def sentence_of(path: Path) -> str:
    """How a file describes itself. ValueError where it does not."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        comment = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
        said = re.sub(r"(?m)^# ?", "", comment)
    if not (sentence := first_sentence(said)):
        name = path.relative_to(ROOT)
        raise ValueError(f"{name} does not say what it is: begin it with a sentence that does")
    return sentence.replace("|", "\\|")


def folders(top: str, pattern: str) -> dict[Path, list[Path]]:
    """folder -> its files without __init__.py, folders by name, the files of one together."""
    found: dict[Path, list[Path]] = {}
    for path in sorted((ROOT / top).glob(pattern), key=lambda p: (p.parent.parts, p.name)):
        files = found.setdefault(path.parent, [])
        if path.name != "__init__.py":
            files.append(path)
    return found


def file_map() -> str:
    """A heading, a sentence and a table of files for every folder."""
    out = []
    for top, pattern in PARTS:
        for folder, files in folders(top, pattern).items():
            out += [f"### `{folder.relative_to(ROOT).as_posix()}/`", ""]
            if (init := folder / "__init__.py").exists():
                out += [f"{sentence_of(init)}.", ""]
            out += ["| file | what it is |", "| --- | --- |"]
            out += [f"| `{file.name}` | {sentence_of(file)} |" for file in files] + [""]
    return "\n".join(out).rstrip() + "\n"


def command_table() -> str:
    """Every command of `lowbit-ft` with its --help text, in the order of the program."""
    from typer.main import get_command

    from lowbit_ft.cli.main import app

    out = ["| command | what it does |", "| --- | --- |"]
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        out.append(f"| `{name}` | {' '.join((command.help or '').split())} |".replace("...", "…"))
    return "\n".join(out) + "\n"


def put(page: str, name: str, block: str) -> str:
    """The page with this block between <!-- name --> and <!-- /name -->."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, found, rest = page.partition(start)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no {start.strip()} ... {end}")
    return f"{head}{start}\n{block}\n{end}{tail}"


def pages() -> dict[Path, str]:
    """Every page that this script writes a part of, as it should be."""
    blocks = (("architecture.md", "map", file_map), ("commands.md", "commands", command_table))
    texts = {page: (DOCS / page).read_text(encoding="utf-8") for page, _, _ in blocks}
    return {DOCS / page: put(texts[page], name, block()) for page, name, block in blocks}


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # this tree, whatever is installed
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
