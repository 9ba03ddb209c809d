"""The pictures of the report: where a layer is drawn, averages, gaps, and what is no number."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from lowbit_ft.report import plots as report_plots


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        ("model.layers.11.self_attn.q_proj", (11, "q_proj")),
        ("model.decoder.layers.0.fc1", (0, "fc1")),
        ("lm_head", (-1, "lm_head")),
        ("model.layers.3.mlp.experts.7.up_proj", (3, "up_proj")),
        ("0.proj", (0, "proj")),
        ("model.visual.2", (-1, "2")),
    ],
)
def test_place_of_a_layer(layer: str, place: tuple[int, str]):
    assert report_plots.place(layer) == place


def test_layer_table_averages_experts_and_marks_gaps():
    values = {"m.0.experts.0.up": 1.0, "m.0.experts.1.up": 3.0, "m.1.down": 5.0, "m.1.up": math.nan}
    blocks, columns, rows = report_plots.layer_table(values)
    assert (blocks, columns) == ([0, 1], ["up", "down"])
    assert rows[0][0] == 2.0 and rows[1][1] == 5.0
    assert math.isnan(rows[0][1]) and math.isnan(rows[1][0])


def test_smoothing_keeps_a_line_straight_and_skips_what_is_not_a_number():
    line = [float(x) for x in range(100)]
    assert report_plots.smooth(line) == pytest.approx(line)  # symmetric windows: no lag, ends included
    assert report_plots.smooth([1.0, math.nan, 3.0])[1] == 2.0
    assert math.isnan(report_plots.smooth([math.nan])[0])


def test_a_deep_model_is_drawn_with_a_colour_bar_instead_of_numbers():
    deep = {f"model.layers.{i}.{p}_proj": 0.01 * (i + 1) for i in range(60) for p in "qkvo"}
    few = {name: value for name, value in deep.items() if ".1." in name}
    assert report_plots.layers([("error", deep, True)]).count('id="text_') < 60 < len(deep)
    flat = report_plots.layers([("all equal", few, True), ("all zero", dict.fromkeys(few, 0.0), False)])
    ElementTree.fromstring(flat)
    assert flat.count('id="text_') > 2 * len(few)  # two numbers per layer, and the labels
