"""The section of the report on found boxes: some pictures of the validation rows, with the boxes that are
right and those that the model found before and after training. A box is drawn where the model is surer of it
than `confidence`."""

from __future__ import annotations

import base64
import binascii
import io
import math
from dataclasses import dataclass
from typing import Any

from .files import STAGES, NotShown, RunFiles
from .html import image, is_number, note

FILE = "boxes.json"
MOST, SIDE = 8, 4096  # pictures that are drawn, and pixels of a side of one
BOXES, NAMED = 100, 24  # boxes of a picture and a stage that are drawn, and categories in the legend
COLOURS = (
    "#ffb000",
    "#4cc9f0",
    "#ff4d8d",
    "#7ae582",
    "#c77dff",
    "#ff7f11",
)  # of the categories, on any ground
Box = tuple[float, float, float, float, int, float]  # x0, y0, x1, y1 in pixels, category, score


@dataclass(frozen=True)
class Picture:
    """image: of Pillow, perhaps smaller than the picture was; size: its width and height, in whose pixels the
    boxes of every stage are."""

    image: Any
    size: tuple[float, float]
    boxes: dict[str, list[Box]]


def boxes_section(run: RunFiles) -> str:
    facts = run.json(FILE, "No boxes were looked for", dict)
    names = facts.get("names")
    names = [str(name) for name in names] if isinstance(names, list) else []
    found = [one for row in _list(facts.get("pictures"))[:MOST] if (one := _picture(row)) is not None]
    if not found:
        raise NotShown(f"{FILE} holds no picture that can be shown.")
    stages = [s for s in STAGES if all(s in one.boxes for one in found)]
    titles = {"true": "right", **{stage: STAGES[stage] for stage in stages}}
    sure = facts.get("confidence")
    cut = any(len(some) > BOXES for one in found for some in one.boxes.values())
    more = f" Of a picture the first {BOXES} are drawn." if cut else ""
    said = f" Boxes of the model are those that it is surer of than {sure:g}." if is_number(sure) else ""
    return image(_drawn(found, titles, names), "boxes that are right, and that were found, by stage") + note(
        f"The first pictures that the table is measured on.{said}{more} Numbers are how sure the model is."
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _picture(row: Any) -> Picture | None:
    """None for what is no picture with boxes."""
    from PIL import Image  # optional: only images need it

    boxes, size = (row.get("boxes"), row.get("size")) if isinstance(row, dict) else (None, None)
    if not isinstance(boxes, dict) or not isinstance(row.get("image"), str) or not isinstance(size, list):
        return None
    if len(size) != 2 or not all(is_number(side) and 0 < side < math.inf for side in size):
        return None
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(row["image"], validate=True)), formats=["PNG"])
        if max(picture.size) > SIDE:
            return None
        pixels = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, binascii.Error):  # Pillow raises all of these
        return None
    wide, high = map(float, size)
    kept = {s: [b for one in _list(some) if (b := _box(one, wide, high))] for s, some in boxes.items()}
    return Picture(pixels, (wide, high), kept) if "true" in kept else None


def _box(values: Any, wide: float, high: float) -> Box | None:
    """A box that leaves the picture is cut a little beyond it."""
    if not isinstance(values, list) or len(values) != 6:
        return None
    if not all(is_number(value) and math.isfinite(value) for value in values):
        return None
    x0, x1 = (min(max(float(values[i]), -wide), 2 * wide) for i in (0, 2))
    y0, y1 = (min(max(float(values[i]), -high), 2 * high) for i in (1, 3))
    return x0, y0, x1, y1, int(values[4]), float(values[5])


def _plainly(name: str) -> str:
    """A name, for matplotlib, which reads mathematics between two $ and leaves out what begins with _."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _drawn(pictures: list[Picture], titles: dict[str, str], names: list[str]) -> str:
    """A row for each of `titles` (stage -> its words), a column for each picture."""
    import matplotlib  # slow, and only pictures need it
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from .plots import STYLE, svg  # slow: matplotlib

    width = 9.2 / len(pictures)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, (width + 0.12) * len(titles) + 0.35), layout="constrained")
        axes = figure.subplots(len(titles), len(pictures), squeeze=False)
        for line, (stage, words) in enumerate(titles.items()):
            axes[line, 0].set_ylabel(words, fontsize=8)
            for axis, picture in zip(axes[line], pictures, strict=True):
                wide, high = picture.size
                axis.imshow(picture.image, interpolation="nearest", extent=(0, wide, high, 0))
                axis.set(xticks=[], yticks=[])
                axis.grid(visible=False)
                axis.spines[:].set_visible(False)
                for x0, y0, x1, y1, category, score in picture.boxes[stage][:BOXES]:
                    colour = COLOURS[category % len(COLOURS)]
                    axis.add_patch(
                        Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.4)
                    )
                    if stage != "true":
                        axis.text(x0, y0, f"{score:.2f}", fontsize=5.5, color=colour, va="bottom")
        every = {box[4] for one in pictures for some in one.boxes.values() for box in some[:BOXES]}
        shown = sorted(every)[:NAMED]
        figure.legend(
            handles=[
                Rectangle((0, 0), 1, 1, fill=False, edgecolor=COLOURS[i % len(COLOURS)], linewidth=1.4)
                for i in shown
            ],
            labels=[_plainly(names[i]) if 0 <= i < len(names) else str(i)[:20] for i in shown],
            loc="outside lower center",
            ncols=max(1, min(6, len(shown))),
            fontsize=8,
        )
        return svg(figure)
