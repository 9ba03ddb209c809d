"""The pictures of the report: each function takes plain numbers and returns one SVG document as text.

matplotlib draws them without pyplot and without a display: a Figure of our own, saved by the SVG backend, so
nothing global is touched. Text is drawn as outlines (no font is needed to read it), the date is left out and
the id salt is fixed, so the same numbers give the same bytes.

The layer picture is a table: one row per block of the model, one column per projection. A layer name is cut
at its first number: "model.layers.3.self_attn.q_proj" is block 3, column "q_proj". Layers that differ only in
further numbers (experts) are averaged.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID = "#1c2733", "#66727f", "#e3e7eb"
BLUE, PALE_BLUE, ORANGE, GREEN = "#2563a8", "#9dbfe3", "#d9730d", "#2f8f6b"

# Applied around each drawing, never globally.
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "lowbit_ft",
}
Points = Sequence[tuple[float, float]]  # (x, y)


def curves(train: Points, valid: Points, rates: Mapping[str, Points]) -> str:
    """Loss over steps, above the learning rates over the same steps.

    Args:
        train: (step, loss) of the training batches; not finite values leave a gap.
        valid: (step, loss) on the validation data, possibly empty.
        rates: name of a learning rate -> (step, rate). Equal curves are drawn once.
    Returns:
        an SVG document.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 4.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        if train:
            steps, losses = zip(*train, strict=True)
            noisy = len(train) >= 20
            top.plot(
                steps,
                losses,
                color=PALE_BLUE if noisy else BLUE,
                lw=1.1 if noisy else 1.8,
                label="training loss",
            )
            if noisy:
                top.plot(steps, smooth(losses), color=BLUE, lw=1.9, label="training loss, smoothed")
        if valid:
            steps, losses = zip(*valid, strict=True)
            top.plot(steps, losses, color=ORANGE, lw=1.6, marker="o", ms=4.5, label="validation loss")
        top.set_ylabel("loss (nats per token)")
        if train or valid:
            top.legend(loc="upper right", ncols=3, bbox_to_anchor=(1.0, 1.13), borderaxespad=0)
        seen: list[list[float]] = []
        for (name, points), color in zip(rates.items(), (GREEN, MUTED, ORANGE), strict=False):
            values = [y for _, y in points]
            if not values or values in seen:
                continue
            seen.append(values)
            bottom.plot([x for x, _ in points], values, color=color, lw=1.6, label=name)
        bottom.set_ylabel("learning rate")
        bottom.set_xlabel("optimizer step")
        bottom.set_ylim(bottom=0)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        if len(seen) > 1:
            bottom.legend(loc="upper right")
        return svg(figure)


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean over about a twentieth of the run, equally far to both sides, so it does not lag.

    Not finite values are left out of the mean; where only such values are in reach the result is NaN.
    """
    half = max(1, len(values) // 40)
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        window = [v for v in values[i - reach : i + reach + 1] if math.isfinite(v)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def place(layer: str) -> tuple[int, str]:
    """(block, column) of a layer name; block -1 for a layer outside the numbered blocks, such as lm_head."""
    found = re.search(r"(?:^|\.)(\d+)\.", layer)
    if not found:
        return -1, layer.rsplit(".", 1)[-1]
    rest = [part for part in layer[found.end() :].split(".") if not part.isdigit()]
    return int(found[1]), rest[-1] if rest else "linear"


def layer_table(values: Mapping[str, float]) -> tuple[list[int], list[str], list[list[float]]]:
    """Arrange per-layer values as (blocks, columns, rows); a cell is the mean of its layers, NaN for none.

    Columns keep the order in which the model lists them.
    """
    cells: dict[tuple[int, str], list[float]] = {}
    columns: dict[str, None] = {}
    for layer, value in values.items():
        block, column = place(layer)
        columns.setdefault(column)
        if math.isfinite(value):
            cells.setdefault((block, column), []).append(value)
    blocks = sorted({block for block, _ in (place(layer) for layer in values)})
    rows = [[_mean(cells.get((block, column), [])) for column in columns] for block in blocks]
    return blocks, list(columns), rows


def layers(panels: Sequence[tuple[str, Mapping[str, float], bool]]) -> str:
    """Heat maps side by side, one row per block and one column per projection.

    Args:
        panels: (title, layer name -> share between 0 and 1, logarithmic colours). Drawn in percent.
    Returns:
        an SVG document. Cells carry their number while there is room for it.
    """
    assert panels, "nothing to draw: the caller leaves the picture out"
    tables = [layer_table(values) for _, values, _ in panels]
    most = max(len(blocks) for blocks, _, _ in tables)
    height = 1.5 + min(max(most * 0.3, 1.2), 9.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, height), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, _, logarithmic), (blocks, columns, rows) in zip(axes, panels, tables, strict=True):
            room = len(blocks) <= 40 and len(columns) * len(panels) <= 24
            _heat(
                figure,
                axis,
                title,
                blocks,
                columns,
                [[100 * v for v in row] for row in rows],
                logarithmic,
                room,
            )
        return svg(figure)


def _heat(
    figure: Figure,
    axis: Axes,
    title: str,
    blocks: Sequence[int],
    columns: Sequence[str],
    rows: Sequence[Sequence[float]],
    logarithmic: bool,
    numbers: bool,
) -> None:
    """One heat map into one axis; rows are percentages."""
    known = [v for row in rows for v in row if math.isfinite(v)]
    high = max(known, default=1.0) or 1.0
    low = min((v for v in known if v > 0), default=high)
    norm = LogNorm(min(low, high / 4), high) if logarithmic else Normalize(0.0, high)
    image = axis.pcolormesh(rows, cmap="Blues", norm=norm, edgecolors="white", linewidth=0.8)
    axis.set_title(title)
    axis.grid(False)
    axis.invert_yaxis()
    axis.tick_params(length=0)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    axis.set_xticks(
        [i + 0.5 for i in range(len(columns))], columns, rotation=35, ha="right", rotation_mode="anchor"
    )
    step = max(1, math.ceil(len(blocks) / 32))
    shown = range(0, len(blocks), step)
    axis.set_yticks([i + 0.5 for i in shown], ["other" if blocks[i] < 0 else str(blocks[i]) for i in shown])
    axis.set_ylabel("block")
    if numbers:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if math.isfinite(value):
                    dark = float(norm(max(value, low) if logarithmic else value)) > 0.6
                    axis.text(
                        x + 0.5,
                        y + 0.5,
                        _short(value),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if dark else INK,
                    )
    else:
        bar = figure.colorbar(image, ax=axis, shrink=0.85, aspect=30, pad=0.02)
        bar.outline.set_visible(False)  # type: ignore[operator]  (matplotlib types the outline as a spine dict)


def stages(rows: Sequence[tuple[str, float | None, float | None]]) -> str:
    """Bars of seconds and of peak memory (GB) for each stage, in the order they ran.

    Args:
        rows: (stage, seconds or None, peak memory in GB or None). A None has no bar.
    Returns:
        an SVG document.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.9 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, column, title, color in (
            (axes[0], 1, "time (seconds)", BLUE),
            (axes[1], 2, "peak memory (GB)", GREEN),
        ):
            widths = [float(row[column] or 0.0) for row in rows]
            axis.barh([row[0] for row in rows], widths, color=color, height=0.62)
            axis.set_title(title)
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0, labelcolor=INK)
            axis.set_xlim(0, (max(widths, default=0.0) or 1.0) * 1.16)
            for y, (row, width) in enumerate(zip(rows, widths, strict=True)):
                if row[column] is not None:
                    axis.text(width, y, f" {_short(width)}", va="center", fontsize=8, color=INK)
        axes[0].invert_yaxis()  # the first stage on top; shared with the right panel
        return svg(figure)


def spectrograms(named: Mapping[str, Sequence[Sequence[float]]], seconds: float) -> str:
    """Spectrograms one below the other, on one scale.

    Args:
        named: name -> frames, each as many logarithms, the lowest tone first.
        seconds: of a frame.
    Returns:
        an SVG document.
    """
    every = sorted(value for frames in named.values() for frame in frames for value in frame)
    scale = Normalize(every[len(every) // 50], every[-1])  # silence is below it
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.5 + 1.25 * len(named)), layout="constrained")
        axes = figure.subplots(len(named), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (name, frames) in zip(axes, named.items(), strict=True):
            bands = [list(band) for band in zip(*frames, strict=True)]
            extent = (0.0, len(frames) * seconds, 0.0, float(len(bands)))
            axis.imshow(
                bands, origin="lower", aspect="auto", interpolation="nearest", norm=scale, extent=extent
            )
            axis.set_title(name)
            axis.set_yticks([])
            axis.grid(visible=False)
        axes[-1].set_xlabel("seconds")
        return svg(figure)


def _short(value: float) -> str:
    """A number in about three characters: 0.04, 1.3, 27, 3100."""
    if value == 0:
        return "0"
    if abs(value) >= 9.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 0.95 else f"{value:.2g}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def svg(figure: Figure) -> str:
    """The figure as SVG text, from its opening tag on (no XML prolog, no DTD, no metadata)."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    return text[text.index("<svg") :]
