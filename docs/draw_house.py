"""Draw docs/house.svg: the folders of lowbit_ft on their floors, and which of them imports which.

    python docs/draw_house.py        # or `make docs`, which also writes the map and the tables of the pages

Nothing in the picture is written by hand. The floors are the contract `floors` of [tool.importlinter] in
pyproject.toml, the imports are what grimp (import-linter's own graph) finds in the code, the sizes are lines
counted in the files. tests/docs/test_readme.py fails while the committed picture is another one.

A folder is a row and, turned at the top, a column; a dot says that the row imports the column, and a larger
dot that more files do. Whatever stands lower in the house stands further right, so a house without a circle
has dots only to the right of its diagonal.
"""

from __future__ import annotations

import math
import sys
import tomllib
from dataclasses import dataclass
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "house.svg"
PACKAGE, GROUND = "lowbit_ft", "lowbit_kernels"

WIDTH, ROW, TOP, LEFT, RIGHT, MARGIN = 860, 25, 112, 288, 50, 16  # in the units of the SVG: CSS pixels
BAR, BAR_LEFT = 62, 204  # the longest bar of lines, and where all bars begin

STYLE = """
svg { color-scheme: light dark; font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
.paper { fill: #ffffff; stroke: #d0d7de; } .band { fill: #f3f5f8; } .ground { fill: #e9e4da; }
.line { stroke: #dfe4ea; } .box { fill: #2f6f8f; } .bar { fill: #a9c8d8; } .dot { fill: #c2571a; }
text { fill: #1f2328; font-size: 13px; } .small { font-size: 11.5px; fill: #59636e; }
.name { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (prefers-color-scheme: dark) {
  .paper { fill: #0d1117; stroke: #3d444d; } .band { fill: #161c24; } .ground { fill: #2a2620; }
  .line { stroke: #2a313a; } .box { fill: #5aa5c8; } .bar { fill: #2d5468; } .dot { fill: #f0883e; }
  text { fill: #e6edf3; } .small { fill: #9aa4af; }
}
"""


@dataclass(frozen=True)
class Room:
    """One row of the picture: a folder (or file) directly inside lowbit_ft, or the kernels below it."""

    module: str  # "lowbit_ft.train"
    label: str  # "train/", "pipeline.py"
    files: int
    lines: int


def floors() -> list[list[str]]:
    """The names on each floor, from the top, as the contract in pyproject.toml lists them."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = [c for c in tables["contracts"] if c["id"] == "floors"]
    return [[name.strip(" ()") for name in floor.split("|")] for floor in contract["layers"]]


def room(module: str) -> Room:
    """The files of a module and their lines, read from the disk."""
    base = ROOT / "kernels" if module == GROUND else ROOT
    place = base.joinpath(*module.split("."))
    files = [place.with_suffix(".py")] if not place.is_dir() else sorted(place.rglob("*.py"))
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    return Room(module, f"{place.name}/" if place.is_dir() else f"{place.name}.py", len(files), lines)


def house() -> list[list[Room]]:
    """The rooms of every floor, from the top; the kernels are the ground."""
    return [*[[room(f"{PACKAGE}.{name}") for name in floor] for floor in floors()], [room(GROUND)]]


def imports(rooms: list[Room]) -> dict[tuple[str, str], int]:
    """(importing module, imported module) of two rooms -> how many pairs of their files do so. TYPE_CHECKING
    imports count too, as they do in the contract.
    """
    graph = grimp.build_graph(PACKAGE, GROUND, cache_dir=None)
    of_file = {m: r.module for r in rooms for m in [r.module, *graph.find_descendants(r.module)]}
    pairs: dict[tuple[str, str], int] = {}
    for file, home in of_file.items():
        for other in graph.find_modules_directly_imported_by(file):
            there = of_file.get(other)  # none: lowbit_ft/__init__.py, the front door
            if there is not None and there != home:
                pairs[home, there] = pairs.get((home, there), 0) + 1
    return pairs


def hundreds(lines: int) -> int:
    """Lines to the next hundred above, so that few edits make a new picture: 1234 -> 1300, 40 -> 100."""
    return math.ceil(lines / 100) * 100


def draw() -> str:
    """The picture as the text of an SVG file: the same text for the same tree."""
    storeys = house()
    rooms = [r for floor in storeys for r in floor]
    column = (WIDTH - LEFT - RIGHT) / len(rooms)
    height = TOP + ROW * len(rooms) + 64
    middle = {r.module: i for i, r in enumerate(rooms)}
    longest = max(hundreds(r.lines) for r in rooms)

    def x(i: int) -> float:
        return LEFT + column * (i + 0.5)

    def y(i: int) -> float:
        return TOP + ROW * (i + 0.5)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title">',
        '<title id="title">The folders of lowbit_ft on their floors, and which imports which</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>',
        *_heads(),
    ]
    start = 0
    for number, floor in enumerate(storeys):
        kind = "ground" if number == len(storeys) - 1 else "band" if number % 2 else ""
        if kind:
            out.append(
                f'<rect class="{kind}" x="{MARGIN}" y="{TOP + ROW * start}" width="{WIDTH - 2 * MARGIN}" '
                f'height="{ROW * len(floor)}"/>'
            )
        start += len(floor)
    for i, r in enumerate(rooms):
        out += _row(r, x(i), y(i), BAR * hundreds(r.lines) / longest, column)
    pairs = imports(rooms)
    for (home, there), count in sorted(pairs.items()):
        i, j = middle[home], middle[there]
        radius = min(2.6 + 1.3 * math.log2(count), 0.42 * min(column, ROW))
        title = escape(f"{rooms[i].label} imports {rooms[j].label}: {count}")
        out.append(
            f'<circle class="dot" cx="{x(j):.1f}" cy="{y(i):.1f}" r="{radius:.1f}">'
            f"<title>{title}</title></circle>"
        )
    up = sum(middle[home] > middle[there] for home, there in pairs)
    out += _legend(TOP + ROW * len(rooms) + 26, up)
    return "\n".join([*out, "</svg>", ""])


def _heads() -> list[str]:
    """What the two columns at the left are."""
    return [
        f'<text class="small" x="{MARGIN + 8}" y="{TOP - 10}">floors, from the top</text>',
        f'<text class="small" x="{BAR_LEFT - 36}" y="{TOP - 10}">lines, at most</text>',
    ]


def _row(r: Room, x: float, y: float, bar: float, column: float) -> list[str]:
    """One room: its name, its lines as a bar, its box on the diagonal, its name turned above its column."""
    side = 0.72 * min(column, ROW)
    label, lines = escape(r.label), f"{hundreds(r.lines):,}"
    return [
        f'<text class="name" x="{MARGIN + 8}" y="{y + 4.5:.1f}">{label}</text>',
        f'<rect class="bar" x="{BAR_LEFT}" y="{y - 8:.1f}" width="{bar:.1f}" height="16" rx="2"/>',
        f'<text class="small" x="{BAR_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{lines}</text>',
        f'<path class="line" d="M{LEFT - 10} {y:.1f}H{WIDTH - MARGIN}M{x:.1f} {TOP}V{y:.1f}"/>',
        f'<rect class="box" x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" '
        f'height="{side:.1f}" rx="2"><title>{label}: {r.files} files</title></rect>',
        f'<text class="small name" transform="translate({x + 3:.1f} {TOP - 8}) rotate(-58)">{label}</text>',
    ]


def _legend(y: float, up: int) -> list[str]:
    """What a reader has to know, below the house. up: pairs of rooms of which the lower imports the upper."""
    first = "A dot: the folder of its row imports the folder of its column; a larger dot, more files do."
    second = (
        f"Squares are the folders themselves. {up} dots are left of their squares: imports that go up."
        if up
        else "Squares are the folders themselves. Every dot is right of its square: imports only go down."
    )
    return [
        f'<text class="small" x="{MARGIN + 8}" y="{y}">{first}</text>',
        f'<text class="small" x="{MARGIN + 8}" y="{y + 18}">{second}</text>',
    ]


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # this tree, whatever is installed
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
