"""The small diffusion transformer of recipes/assets/tiny-dit: its pictures, its training.

    python -m benchmarks.tiny_dit images DIR       pictures of one shape each as PNG, in two parquet files
    python -m benchmarks.tiny_dit train DIR        the dense transformer, at most --minutes of processor time
    python -m benchmarks.tiny_dit asset DIR OUT    it in bf16, a folder as diffusers writes them

A `DiTTransformer2DModel` of diffusers learns the velocity from a picture to noise, x_t = (1 - t) x + t noise
(arXiv 2209.03003), of 16 x 16 pictures of four shapes. What it learns from is drawn by a seed, and none of it
is among the rows that are written.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

SHAPES = ("circle", "square", "triangle", "cross")
SIDE, FINE = 16, 4  # pixels of a side; drawn so many times larger and averaged
KIND = "DiTTransformer2DModel"
SIZES = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": 3,
    "num_layers": 4,
    "sample_size": SIDE,
    "patch_size": 2,
    "num_embeds_ada_norm": len(SHAPES),
}
DROPPED = 0.1  # of the labels, for guidance


def picture(name: str, chance: random.Random) -> Image.Image:
    """One shape of a light colour on a dark ground."""
    side = SIDE * FINE
    ground = tuple(chance.randrange(0, 60) for _ in range(3))
    colour = [chance.randrange(40, 256) for _ in range(3)]
    colour[chance.randrange(3)] = 255
    image = Image.new("RGB", (side, side), ground)
    draw, r = ImageDraw.Draw(image), chance.uniform(0.24, 0.4) * side
    x, y = (chance.uniform(r, side - r) for _ in range(2))
    if name == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(colour))
    elif name == "square":
        draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=tuple(colour))
    elif name == "triangle":
        draw.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=tuple(colour))
    else:
        for w, h in ((r, 0.32 * r), (0.32 * r, r)):
            draw.rectangle((x - w, y - h, x + w, y + h), fill=tuple(colour))
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def pictures(seed: str, count: int) -> tuple[list[Image.Image], list[int]]:
    chance = random.Random(seed)
    labels = [chance.randrange(len(SHAPES)) for _ in range(count)]
    return [picture(SHAPES[label], chance) for label in labels], labels


def images(folder: Path) -> None:
    """Rows as `datasets` writes them: {image, label}."""
    import datasets  # slow

    folder.mkdir(parents=True, exist_ok=True)
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    for split, count in (("train", 192), ("valid", 48)):
        found, labels = pictures(split, count)
        rows = {
            "image": [{"bytes": png(one), "path": None} for one in found],
            "label": [SHAPES[label] for label in labels],
        }
        path = folder / f"{split}.parquet"
        datasets.Dataset.from_dict(rows, kinds).to_parquet(str(path))
        print(f"{path}: {count} rows, {path.stat().st_size:,} bytes")


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def tensor_of(found: list[Image.Image]) -> Tensor:
    """[B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.stack([np.asarray(one) for one in found])).permute(0, 3, 1, 2) / 127.5 - 1


def fresh() -> Any:
    """The transformer with the start of the paper (arXiv 2212.09748): what modulates, and what comes out, is
    zero."""
    import diffusers  # optional, slow

    torch.manual_seed(0)
    model: Any = getattr(diffusers, KIND)(**SIZES)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # labels are dropped below, by the seed
    nn.init.zeros_(model.proj_out_1.weight)
    nn.init.zeros_(model.proj_out_2.weight)
    return model


def train(folder: Path, minutes: float, size: int, rate: float) -> None:
    """The learning rate falls with the processor time that is left; the mean of the last weights is kept."""
    model = fresh().train()
    found, labels = pictures("model", 8192)
    data, names = tensor_of(found), torch.tensor(labels)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01)
    mean = {name: value.detach().clone() for name, value in model.state_dict().items()}
    draw = torch.Generator().manual_seed(1)
    begun, step, total, log = time.process_time(), 0, 0.0, []
    while (used := (time.process_time() - begun) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 50)
            group["lr"] = rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * used)) / 2)
        loss = flow_loss(model, *drawn(data, names, size, draw))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.99, step / (step + 10))
        for name, value in model.state_dict().items():
            mean[name].lerp_(value, 1 - decay)
        step, total = step + 1, total + float(loss.detach())
        if step % 50 == 0:
            log.append({"step": step, "loss": total / 50, "seconds": round(time.process_time() - begun, 1)})
            print(json.dumps(log[-1]), flush=True)
            total = 0.0
    model.load_state_dict(mean)
    model.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(log))


def drawn(
    data: Tensor, names: Tensor, size: int, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x [B, 3, H, W], labels [B] of which some are dropped, t [B], noise)."""
    picked = torch.randint(len(data), (size,), generator=draw)
    x, labels = data[picked], names[picked]
    labels = torch.where(torch.rand(size, generator=draw) < DROPPED, len(SHAPES), labels)
    even = (torch.arange(size) + torch.rand(size, generator=draw)) / size  # every part of 0..1 in each batch
    return x, labels, even, torch.randn(x.shape, generator=draw)


def flow_loss(model: Any, x: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    at = t[:, None, None, None]
    found = model((1 - at) * x + at * noise, timestep=1000 * t, class_labels=labels).sample
    return (found - (noise - x)).square().mean()


def asset(folder: Path, out: Path) -> None:
    import diffusers  # optional, slow

    model: Any = getattr(diffusers, KIND).from_pretrained(folder, torch_dtype=torch.bfloat16)
    model.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config.pop("_name_or_path", None)
    config["id2label"] = dict(enumerate(SHAPES))  # as a pipeline's model_index.json has them
    config["prediction"] = "velocity"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in sorted(out.iterdir()):
        print(f"{file}: {file.stat().st_size:,} bytes")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("images", "train", "asset"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=3.0, help="of processor time")
    parser.add_argument("--size", type=int, default=32, help="pictures of a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    given = parser.parse_args()
    if given.what == "images":
        images(given.folder)
    elif given.what == "train":
        train(given.folder, given.minutes, given.size, given.rate)
    elif given.out is None:
        parser.error("asset: give OUT too")
    else:
        asset(given.folder, given.out)


if __name__ == "__main__":
    main()
