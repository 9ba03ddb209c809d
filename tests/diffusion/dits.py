"""Small random transformers of diffusers as folders, and rows of pictures."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SIZE = 8
LABELS = ("dark", "light", "red")
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 3,
    "num_layers": 2,
    "sample_size": SIZE,
    "patch_size": 2,
    "num_embeds_ada_norm": len(LABELS),
}
SD3 = {
    "sample_size": SIZE,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 64,
    "out_channels": 4,
}
FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}
SIZES = {"DiTTransformer2DModel": DIT, "SD3Transformer2DModel": SD3, "FluxTransformer2DModel": FLUX}


def made(name: str = "DiTTransformer2DModel", **changes: Any) -> Any:
    """diffusers' own, with weights that nothing is zero by."""
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, name)(**SIZES[name] | changes).eval()


def write(folder: Path, name: str = "DiTTransformer2DModel", **changes: Any) -> Path:
    made(name, **changes).save_pretrained(folder)
    return folder


def picture(label: str, chance: random.Random) -> bytes:
    low, high = {"dark": (0, 60), "light": (190, 256), "red": (0, 60)}[label]
    image = Image.new("RGB", (SIZE, SIZE))
    for x in range(SIZE):
        for y in range(SIZE):
            pixel = [chance.randrange(low, high) for _ in range(3)]
            image.putpixel((x, y), (255, *pixel[1:]) if label == "red" else tuple(pixel))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def rows(folder: Path, count: int, seed: int = 0) -> Path:
    """A jsonl file of {image: path, label}."""
    chance, lines = random.Random(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        label = LABELS[number % len(LABELS)]
        (folder / f"{number}.png").write_bytes(picture(label, chance))
        lines.append(json.dumps({"image": str(folder / f"{number}.png"), "label": label}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def states(path: Path, name: str, seed: int, tokens: int = 6) -> Path:
    """What a text encoder said, for a model of SIZES."""
    from safetensors.torch import save_file

    draw, own = torch.Generator().manual_seed(seed), SIZES[name]
    made = {
        "encoder_hidden_states": torch.randn(tokens, own["joint_attention_dim"], generator=draw),
        "pooled_projections": torch.randn(own["pooled_projection_dim"], generator=draw),
    }
    save_file(made, path)
    return path


def text_rows(folder: Path, name: str, count: int, seed: int = 0) -> Path:
    """A jsonl file of {image: path of latents, text: path of states}: the latents' mean is by the text."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    draw, channels = torch.Generator().manual_seed(seed), 4 if name.startswith("SD3") else 1
    texts = [states(folder / f"text-{i}.safetensors", name, i) for i in range(3)]
    lines = []
    for number in range(count):
        noise = torch.randn(channels, SIZE, SIZE, generator=draw)
        save_file({"latent": 0.2 * noise + (number % 3 - 1)}, folder / f"{number}.safetensors")
        row = {"image": f"{number}.safetensors", "text": texts[number % 3].name}
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"
