"""The boxes of the report: drawn at their places, and left out where a file of a stranger makes no sense."""

from __future__ import annotations

import base64
import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lowbit_ft.report.boxes import FILE, boxes_section
from lowbit_ft.report.files import NotShown, RunFiles
from tests.report.made_up_run import run


def picture(**changes: Any) -> dict[str, Any]:
    file = BytesIO()
    Image.new("RGB", (8, 6), "red").save(file, "PNG")
    boxes = {"true": [[1, 1, 4, 3, 0, 1.0]], "base": [[1, 1, 4, 3, 1, 0.75]], "trained": []}
    return {
        "image": base64.b64encode(file.getvalue()).decode(),
        "size": [80, 60],
        "boxes": boxes,
    } | changes


def facts(*pictures: Any) -> dict[str, Any]:
    return {"names": ["cat<b>", "dog"], "confidence": 0.5, "pictures": list(pictures)}


def section(folder: Path, *pictures: Any) -> str:
    (folder / FILE).write_text(json.dumps(facts(*pictures)))
    return boxes_section(RunFiles(folder))


def test_a_row_for_each_stage_that_there_is(tmp_path: Path) -> None:
    page = run(tmp_path, boxes__json=facts(picture(), picture()))
    text = page.text["boxes"]
    assert "surer of than 0.5" in text and "Not shown" not in text
    source = (tmp_path / "report.html").read_text()
    part = source[source.index('id="boxes"') : source.index('id="training"')]
    found = re.search(r"base64,([A-Za-z0-9+/=]+)", part)
    assert found is not None
    svg = base64.b64decode(found[1]).decode()
    assert svg.count("<image") == 6, "right, full precision and trained, of two pictures"


@pytest.mark.parametrize(
    "broken",
    [
        7,
        {},
        picture(image="no base64!"),
        picture(image=base64.b64encode(b"no picture").decode()),
        picture(size=[0, 3]),
        picture(size="large"),
        picture(boxes=[]),
        picture(boxes={"base": []}),
    ],
    ids=("number", "empty", "no base64", "no PNG", "no size", "size", "no boxes", "nothing right"),
)
def test_what_is_no_picture_is_left_out(tmp_path: Path, broken: Any) -> None:
    with pytest.raises(NotShown, match="holds no picture that can be shown"):
        section(tmp_path, broken)


def test_the_others_are_shown(tmp_path: Path) -> None:
    assert "surer" in section(tmp_path, 7, picture(size=[0, 3]), picture())


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """Matplotlib reads mathematics between dollars: a class of such a name ended the report of its run."""
    one = facts(picture())
    for names in (["$a_{$", "_hidden"], ["$5", "b"]):
        (tmp_path / FILE).write_text(json.dumps(one | {"names": names}))
        assert "surer" in boxes_section(RunFiles(tmp_path))


def test_boxes_without_end_are_cut(tmp_path: Path) -> None:
    many = [[-1e308, 0, 1e308, 4, category, 1.0] for category in range(3000)]
    one = picture(boxes={"true": many})
    assert "the first 100 are drawn" in section(tmp_path, one)


def test_what_is_no_box_is_left_out(tmp_path: Path) -> None:
    odd = [7, [1, 2], [1, 2, 3, 4, 0, "sure"], [1, 2, float("inf"), 4, 0, 1], [1, 1, 4, 3, 9, 0.9]]
    one = picture(boxes={"true": odd, "base": "none", "trained": odd})
    assert "surer" in section(tmp_path, one)


@pytest.mark.parametrize(("found", "state"), [(0.74, "good"), (0.7396, "near"), (0.7, "bad")])
def test_a_reader_without_a_loss_is_compared_by_its_score(tmp_path: Path, found: float, state: str) -> None:
    rows = [
        {"stage": "trained", "loss": 3.5, "scores": {"map": 0.74}},
        {"stage": "merged", "loss": 3.5, "scores": {"map": 0.74}},
        {"stage": "exported", "loss": None, "scores": {"map": found}},
    ]
    page = run(tmp_path, evaluation__json={"rows": rows}, recipe__yaml="export: {format: onnx}")
    good = {"bad": "bad"}.get(state, "good")
    assert any(a.get("class") == f"verdict {good}" for _, a in page.tags)
    said = {
        "good": "trained = merged = exported map = 0.7400",
        "near": "trained = merged map = 0.7400. Exported has 0.7396, computed by another library",
        "bad": "the values of map differ",
    }
    assert said[state] in page.text["head"]
