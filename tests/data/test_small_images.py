"""data.synthesis task_images: adaptive labels that are found in smaller images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForObjectDetection

from lowbit_ft.data.synthesis import SYNTHESIS
from lowbit_ft.data.synthesis.base import Given
from lowbit_ft.data.synthesis.invert import Frame
from lowbit_ft.model.images import picture_of, read_processor
from lowbit_ft.tasks import TASKS
from tests.data.test_task_images import ROOT, SHAPES, VIT, maker


def test_labels_are_found_in_smaller_images() -> None:
    """adapt.scale: where labels are found is small, what is stored is not; a model of one size says no."""
    folder = ROOT / "recipes" / "assets" / "tiny-rtdetr"
    detector: Any = AutoModelForObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
    task = TASKS["object_detection"].model_validate({"kind": "object_detection", "labels": SHAPES[:3]})
    boxes, sizes = read_processor(folder), list[int]()
    given = Given(boxes, [], None, 12, task.labeller(boxes))
    keys = {
        "labels": "adaptive",
        "steps": 3,
        "check_every": 3,
        "adapt": {"begin": 0, "every": 1, "scale": 0.5},
    }
    config = SYNTHESIS["task_images"].model_validate({"kind": "task_images", "samples": 2, **keys})
    with detector.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["pixel_values"].shape[-1]), with_kwargs=True
    ):
        shard = config.maker(given).write(range(2), detector, lambda rows, steps: None)
    assert set(sizes) == {32, 64} and sizes == sorted(sizes), "first the small ones"
    assert [picture_of(data).size for data in shard.files.values()] == [(64, 64)] * 2
    processor = read_processor(VIT)
    small = Frame(processor).scaled(0.5)
    x = torch.rand(3, small.height, small.width)
    whole = Frame(processor)(nn.functional.pad(x, (0, 16, 0, 16)))
    assert torch.equal(small(x), whole[..., :16, :16])
    model: Any = AutoModelForImageClassification.from_pretrained(VIT, dtype=torch.float32).eval()
    with pytest.raises(ValueError, match=r"adapt.scale: got 0.5.*takes no images of 16 x 16.*raise it"):
        maker(processor, **keys).write(range(2), model, lambda rows, steps: None)
