"""The parts the report page is made of: tables, tiles, pictures, numbers as text, and the style sheet.

A function that returns HTML takes plain text and escapes it here, so that no caller can forget to.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard


def escape(text: str) -> str:
    """Text as HTML text, safe inside quoted attributes too."""
    return html.escape(text, quote=True)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1) -> str:
    """An HTML table; the first `words` columns are words (left), the others numbers (right)."""
    side = ["" if i < words else ' class="n"' for i in range(len(head))]
    top = "".join(f"<th{s}>{escape(cell)}</th>" for s, cell in zip(side, head, strict=True))
    lines = []
    for row in rows:
        cells = "".join(f"<td{s}>{escape(plain(cell))}</td>" for s, cell in zip(side, row, strict=True))
        lines.append(f"<tr>{cells}</tr>\n")
    return (
        f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody>\n</table></div>"
    )


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """(label, value) pairs as a row of tiles; nothing for no facts."""
    cells = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for label, value in facts
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def folded(title: str, content: str) -> str:
    """Content behind a line that opens it; `content` is HTML."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def image(picture: str | bytes, words: str) -> str:
    """An SVG document, or a PNG file, inside the page. As an image an SVG has its own ids, so pictures cannot
    mix them up."""
    kind = "svg+xml" if isinstance(picture, str) else "png"
    data = base64.b64encode(picture.encode() if isinstance(picture, str) else picture).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{escape(words)}">'


def png(data: bytes, words: str) -> str:
    """A PNG inside the page, small ones four times as large."""
    code = base64.b64encode(data).decode()
    return (
        f'<img src="data:image/png;base64,{code}" alt="{escape(words)}" '
        'style="width:96px;image-rendering:pixelated">'
    )


def is_number(value: object) -> TypeGuard[float]:
    """A finite int or float; a bool is not a number here."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else value.bit_length() < 1000


def number(value: Any, digits: int = 0) -> str:
    """1234.5 -> "1,234.50" with two digits; a dash for anything that is not a number."""
    return f"{value:,.{digits}f}" if is_number(value) else "–"


def plain(value: Any) -> str:
    """Any JSON value as short text."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ", ".join(value)
    if isinstance(value, dict) and not any(isinstance(part, list | dict) for part in value.values()):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items())
    return json.dumps(value, ensure_ascii=False)


def words(key: object) -> str:
    """A key of a JSON file as a label: "git_commit" -> "git commit"."""
    return str(key).replace("_", " ")


def duration(seconds: float) -> str:
    """Seconds as "45 s", "2.5 min" or "3 h 05 min"."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    hours, minutes = whole // 3600, whole % 3600 / 60
    return f"{hours} h {int(minutes):02d} min" if hours else f"{minutes:.1f} min"


STYLE = """
:root { --ink: #1c2733; --muted: #5d6975; --line: #dfe4e9; --soft: #f5f7f9; --accent: #2563a8; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Arial, "DejaVu Sans", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 40px 28px 72px; }
.kicker { margin: 0; color: var(--accent); font-weight: 600; font-size: 13px; letter-spacing: .04em; }
h1 { margin: 2px 0 4px; font-size: 30px; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 14px; font-size: 20px; letter-spacing: -.005em; }
h3 { margin: 18px 0 6px; font-size: 13px; color: var(--muted); font-weight: 600; }
section { margin-top: 44px; padding-top: 22px; border-top: 1px solid var(--line); }
.subtitle { margin: 0 0 18px; color: var(--muted); overflow-wrap: anywhere; }
.verdict { margin: 0 0 18px; padding: 12px 16px; font-weight: 600; border-left: 4px solid;
  border-radius: 4px; }
.verdict.good { border-color: #2f8f6b; background: #edf7f2; }
.verdict.bad { border-color: #c0392b; background: #fdf0ee; }
.verdict.open { border-color: #b58900; background: #fdf8e8; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 10px;
  margin: 14px 0; }
.tiles div { padding: 10px 14px; background: var(--soft); border-radius: 6px; }
.tiles b { display: block; font-size: 19px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tiles span { color: var(--muted); font-size: 12.5px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 16px; font-size: 13.5px; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--muted); font-weight: 600; font-size: 12.5px; }
thead tr { border-bottom: 2px solid var(--line); }
th, td { padding: 6px 12px 6px 0; vertical-align: top; }
td { border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th.n, td.n { text-align: right; padding: 6px 0 6px 12px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
pre { margin: 0; padding: 12px 14px; background: var(--soft); border-radius: 6px;
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
img { display: block; width: 100%; height: auto; margin: 6px 0 12px; }
.note { margin: 8px 0 0; color: var(--muted); font-size: 13.5px; }
.missing { margin: 0; padding: 10px 14px; background: var(--soft); border-radius: 6px; color: var(--muted); }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; }
.sample { margin-bottom: 22px; padding-bottom: 6px; }
.sample > h3 { margin-top: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 16px; }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; } }
@media print {
  body { font-size: 11pt; } main { max-width: none; padding: 0; } nav, details { display: none; }
  section { margin-top: 24px; } h2, h3 { break-after: avoid; }
  .sample, tr, img, .tiles { break-inside: avoid; }
  .verdict, .tiles div, pre, .missing { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
