"""Small random models of images with an image processor, as checkpoints; and pictures of shapes that they can
learn.

Two layers, 32 wide, 16 patches, or two stages. A picture is a bar on a dark ground, of any colour and at any
place; its label is how the bar lies.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BeitConfig,
    ConvNextConfig,
    DeiTConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

SIZE = 32
LABELS = ("across", "upright")


_LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 8,
}
_STAGES: dict[str, Any] = {"hidden_sizes": [16, 32], "depths": [1, 1]}
KINDS: dict[str, Any] = {
    "vit": lambda: ViTConfig(**_LAYERS),
    "deit": lambda: DeiTConfig(**_LAYERS),
    "beit": lambda: BeitConfig(**_LAYERS, use_relative_position_bias=True),
    "swin": lambda: SwinConfig(
        embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=SIZE, patch_size=4
    ),
    "convnext": lambda: ConvNextConfig(**_STAGES, num_stages=2, layer_scale_init_value=1.0),
    "resnet": lambda: ResNetConfig(**_STAGES, embedding_size=8, layer_type="basic"),
}
CONVOLUTIONAL = ("convnext", "resnet")


def checkpoint(folder: Path, kind: str, head: bool = False, labels: int = 2) -> Path:
    """A body as a checkpoint; head: with one of so many labels."""
    torch.manual_seed(0)
    config = KINDS[kind]()
    config.num_labels = labels
    config.architectures = []  # transformers looks through it where it has several classes (DeiT)
    model = (AutoModelForImageClassification if head else AutoModel).from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 or "projection.weight" in name:  # drawn for long training, they are too small
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": SIZE, "width": SIZE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def vit(folder: Path, head: bool = False) -> Path:
    return checkpoint(folder, "vit", head)


def picture(label: str, chance: random.Random) -> bytes:
    """A PNG file, 40 wide and 40 high, which the processor makes smaller."""
    image = Image.new("RGB", (40, 40), tuple(chance.randrange(60) for _ in range(3)))
    long, x, y = chance.randint(22, 34), chance.randint(2, 5), chance.randint(4, 30)
    box = (x, y, x + long, y + 5) if label == "across" else (y, x, y + 5, x + long)
    ImageDraw.Draw(image).rectangle(box, fill=tuple(chance.randrange(120, 256) for _ in range(3)))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """{image: its bytes, label}."""
    chance = random.Random(seed)
    return [
        {"image": picture(label, chance), "label": label}
        for label in (chance.choice(LABELS) for _ in range(count))
    ]


def parquet(path: Path, found: list[dict[str, Any]]) -> str:
    """As `datasets` writes them: pictures with their bytes."""
    import datasets  # slow

    columns = {
        "image": [{"bytes": r["image"], "path": None} for r in found],
        "label": [r["label"] for r in found],
    }
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, kinds).to_parquet(str(path))
    return str(path)


def folder_of(path: Path, found: list[dict[str, Any]], split: str) -> Path:
    """As a folder of pictures: split, label, number.png."""
    for number, row in enumerate(found):
        file = path / split / row["label"] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["image"])
    return path
