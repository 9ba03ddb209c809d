"""Pictures of shapes with their boxes, and the small RT-DETR that has found them, for recipes/assets.

    python -m benchmarks.detection_assets             boxes/ and tiny-rtdetr/
    python -m benchmarks.detection_assets --steps 0   the pictures alone

64 x 64 pixels, one to three shapes on a dark ground with spots; circles are 6 in 10, squares 3, triangles 1.
The detector has batch norms of its own (freeze_backbone_batch_norms: false), whose running statistics are
those of the pictures that it was trained on. Every picture is seen once. The same command gives the same
pictures (the same bytes of the model on the same kind of CPU).
"""

from __future__ import annotations

import argparse
import io
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

ASSETS = Path(__file__).resolve().parents[1] / "recipes" / "assets"
NAMES, PRIOR, SIZE = ("circle", "square", "triangle"), (6, 3, 1), 64
COUNTS = {"train": 240, "valid": 80}
PROCESSOR = {
    "image_processor_type": "RTDetrImageProcessor",
    "size": {"height": SIZE, "width": SIZE},
    "do_normalize": False,
    "do_pad": False,
}


def scene(chance: random.Random) -> tuple[Image.Image, list[list[int]], list[str]]:
    """A picture, the boxes of its shapes (x, y, width, height in pixels) and their names."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(chance.randrange(70) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        spot = (chance.randrange(SIZE), chance.randrange(SIZE))
        draw.point(spot, fill=tuple(chance.randrange(256) for _ in range(3)))
    boxes: list[list[int]] = []
    names: list[str] = []
    for _ in range(chance.randint(1, 3)):
        wide, high = chance.randint(13, 28), chance.randint(13, 28)
        for _ in range(20):  # places until one is free
            x, y = chance.randint(1, SIZE - wide - 1), chance.randint(1, SIZE - high - 1)
            if all(x >= a + c or a >= x + wide or y >= b + d or b >= y + high for a, b, c, d in boxes):
                break
        else:
            continue
        name, fill = chance.choices(NAMES, PRIOR)[0], tuple(chance.randrange(110, 256) for _ in range(3))
        edges = (x, y, x + wide - 1, y + high - 1)  # of the last pixels, which Pillow fills too
        if name == "circle":
            draw.ellipse(edges, fill=fill)
        elif name == "square":
            draw.rectangle(edges, fill=fill)
        else:
            draw.polygon([(x, edges[3]), (edges[2], edges[3]), (x + wide // 2, y)], fill=fill)
        boxes.append([x, y, wide, high])
        names.append(name)
    return image, boxes, names


def write_boxes(folder: Path) -> None:
    """Rows as `datasets` has them: {image, objects: {bbox, category}}; of each split one parquet file."""
    import datasets  # slow

    folder.mkdir(exist_ok=True)
    objects = {
        "bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"), 4)),
        "category": datasets.Sequence(datasets.Value("string")),
    }
    kinds = datasets.Features({"image": datasets.Image(), "objects": objects})
    for split, count in COUNTS.items():
        chance, rows = random.Random(split), []
        for _ in range(count):
            image, boxes, names = scene(chance)
            file = io.BytesIO()
            image.save(file, "PNG")
            found = {"bbox": boxes, "category": names}
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "objects": found})
        path = folder / f"{split}.parquet"
        columns = {key: [row[key] for row in rows] for key in kinds}
        datasets.Dataset.from_dict(columns, kinds).to_parquet(str(path))
        print(f"{path}: {count} rows, {path.stat().st_size:,} bytes")


def configuration() -> RTDetrConfig:
    """0.43 million parameters: a ResNet of three stages, two levels of features, two layers that decode."""
    levels_of: Any = {"out_indices": [2, 3]}
    backbone = RTDetrResNetConfig(
        **levels_of,
        embedding_size=24,  # as wide as the first stage, which has no shortcut of its own
        hidden_sizes=[24, 48, 64],
        depths=[1, 1, 1],
        layer_type="basic",
    )
    width, levels = 64, 2
    return RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_hidden_dim=width,
        encoder_in_channels=[48, 64],
        feat_strides=[8, 16],
        encode_proj_layers=[1],
        encoder_layers=1,
        encoder_ffn_dim=128,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        d_model=width,
        decoder_in_channels=[width] * levels,
        decoder_ffn_dim=128,
        num_feature_levels=levels,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_n_points=4,
        num_queries=12,
        num_denoising=12,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )


def batch(chance: random.Random, count: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """New pictures, as the image processor makes them, and what is in them."""
    pixels, labels = [], []
    for _ in range(count):
        image, boxes, names = scene(chance)
        pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
        corners = torch.tensor(boxes, dtype=torch.float32)
        centre = torch.cat([corners[:, :2] + corners[:, 2:] / 2, corners[:, 2:]], 1) / SIZE
        labels.append({"class_labels": torch.tensor([NAMES.index(n) for n in names]), "boxes": centre})
    return torch.stack(pixels), labels


def train(folder: Path, steps: int, rate: float, save: bool = True) -> Any:
    """All weights, in float32; saved in bfloat16 with its image processor."""
    torch.manual_seed(0)
    model: Any = RTDetrForObjectDetection(configuration()).train()
    print(f"tiny-rtdetr: {sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    chance, begin = random.Random("model"), time.perf_counter()
    for step in range(1, steps + 1):
        pixels, labels = batch(chance, 32)
        loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            took = time.perf_counter() - begin
            print(f"tiny-rtdetr: step {step}, loss {loss.item():.3f}, {took:.0f} s", flush=True)
            if save:  # what is cut short has kept something
                model.to(torch.bfloat16).save_pretrained(folder)
                model.float()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="0: the pictures alone")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="the highest learning rate")
    given = parser.parse_args()
    write_boxes(ASSETS / "boxes")
    if given.steps:
        folder = ASSETS / "tiny-rtdetr"
        folder.mkdir(exist_ok=True)
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=1) + "\n")
        train(folder, given.steps, given.rate)


if __name__ == "__main__":
    main()
