"""Small random detectors with their image processors, as checkpoints; and pictures with boxes.

RT-DETR with batch norms of its own, D-FINE, DETR and YOLOS, 32 x 32 pixels. A picture has one or two
rectangles on a dark ground; which category one is, its colour says.
"""

from __future__ import annotations

import json
import random
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from torch import nn

SIZE = 32
LABELS = ("red", "green", "blue")
COLOURS = {"red": (230, 30, 30), "green": (30, 230, 30), "blue": (40, 40, 240)}


def names(labels: tuple[str, ...] = LABELS) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}


def _resnet(**keys: Any) -> Any:
    small: Any = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return transformers.RTDetrResNetConfig(**(small | keys))


def _rt_detr(**keys: Any) -> dict[str, Any]:
    return {
        "encoder_hidden_dim": 16,
        "encoder_in_channels": [8, 16],
        "feat_strides": [4, 8],
        "encode_proj_layers": [1],
        "encoder_ffn_dim": 32,
        "encoder_attention_heads": 2,
        "d_model": 16,
        "decoder_in_channels": [16, 16],
        "decoder_ffn_dim": 32,
        "num_feature_levels": 2,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_n_points": 2,
        "num_queries": 8,
        "num_denoising": 4,
        "freeze_backbone_batch_norms": False,
        **keys,
    }


def config_of(kind: str, labels: tuple[str, ...] = LABELS) -> Any:
    """The configuration of a small detector."""
    found = names(labels)
    if kind == "rt_detr":
        return transformers.RTDetrConfig(backbone_config=_resnet(out_indices=[1, 2]), **_rt_detr(**found))
    if kind == "d_fine":
        stages: Any = {"out_indices": [1, 2]}
        backbone = transformers.HGNetV2Config(
            **stages,
            embedding_size=8,
            hidden_sizes=[16, 16],
            depths=[1, 1],
            stem_channels=[3, 8, 8],
            stage_in_channels=[8, 16],
            stage_mid_channels=[8, 8],
            stage_out_channels=[16, 16],
            stage_num_blocks=[1, 1],
            stage_downsample=[False, True],
            stage_light_block=[False, True],
            stage_kernel_size=[3, 3],
            stage_numb_of_layers=[1, 1],
        )
        keys = {**_rt_detr(**found), "encoder_in_channels": [16, 16], "decoder_n_points": [2, 2]}
        return transformers.DFineConfig(backbone_config=backbone, **keys)
    if kind == "detr":
        small: Any = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        own: Any = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
        return transformers.DetrConfig(
            backbone_config=transformers.ResNetConfig(**small),
            **own,
            d_model=16,
            encoder_layers=1,
            decoder_layers=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            num_queries=8,
            dropout=0.0,
            **found,
        )
    return transformers.YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[SIZE, SIZE],
        patch_size=8,
        num_detection_tokens=8,
        **found,
    )


PROCESSORS = {
    "rt_detr": "RTDetrImageProcessor",
    "d_fine": "RTDetrImageProcessor",
    "detr": "DetrImageProcessor",
    "yolos": "YolosImageProcessor",
}


def detector(folder: Path, kind: str = "rt_detr", labels: tuple[str, ...] = LABELS) -> Path:
    """A checkpoint whose batch norms have statistics that are no identity."""
    torch.manual_seed(0)
    model = transformers.AutoModelForObjectDetection.from_config(config_of(kind, labels))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.8, 1.6)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": PROCESSORS[kind],
        "size": {"height": SIZE, "width": SIZE},
        "do_pad": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """{image: its bytes, objects: {bbox, category}}; the first has two boxes, every fifth none."""
    chance, found = random.Random(seed), []
    for number in range(count):
        image = Image.new("RGB", (48, 40), tuple(chance.randrange(40) for _ in range(3)))
        boxes, categories = [], []
        for left in (2, 25)[: 2 if number == 0 else chance.randint(1, 2) if number % 5 != 4 else 0]:
            wide, high, top = chance.randint(10, 20), chance.randint(10, 24), chance.randint(1, 14)
            category = chance.choice(LABELS)
            edges = (left, top, left + wide - 1, top + high - 1)
            ImageDraw.Draw(image).rectangle(edges, fill=COLOURS[category])
            boxes.append([left, top, wide, high])
            categories.append(category)
        file = BytesIO()
        image.save(file, "PNG")
        found.append({"image": file.getvalue(), "objects": {"bbox": boxes, "category": categories}})
    return found


def write(path: Path, found: list[dict[str, Any]]) -> str:
    """Rows of JSON, the pictures in files beside them."""
    lines = []
    for number, row in enumerate(found):
        file = path.with_suffix("") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["image"])
        lines.append(json.dumps({**row, "image": str(file)}))
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def coco(folder: Path, found: list[dict[str, Any]], split: str) -> Path:
    """The same as COCO's own annotation file, annotations/instances_SPLIT.json, pictures in SPLIT/ beside it.
    Categories are numbered 2, 40, 7, images from 100 down by threes."""
    numbers = dict(zip(LABELS, (2, 40, 7), strict=True))
    images, annotations = [], []
    for number, row in enumerate(found):
        file = folder / split / f"{number:012}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["image"])
        one = 100 - 3 * number
        images.append({"id": one, "file_name": file.name, "width": 48, "height": 40})
        for box, name in zip(*row["objects"].values(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": one,
                    "category_id": numbers[name],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": [],
                }
            )
    file = folder / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    tables = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(tables))
    return file
