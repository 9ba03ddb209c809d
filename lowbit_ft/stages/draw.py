"""draw: pictures of a diffusion transformer in a folder, as one sheet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..diffusion.names import KEY, MODEL_TYPE
from ..diffusion.paths import PATHS, sampled
from ..export.reader import load_exported
from ..files.atomic import write_bytes
from ..model.config import read_config
from ..model.linear import packed_op_only
from ..names import did_you_mean, listed
from .runnable import torch_folder

MOST = 256  # pictures
MOST_STEPS = 1000
FIRST = 8  # labels, where none is named


def draw_pictures(
    folder: Path,
    output: Path,
    labels: Sequence[str] = (),
    count: int = 4,
    steps: int = 20,
    guidance: float = 1.0,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Writes `output`, a PNG file with a row of `count` pictures for each label (none: the first ones), and
    returns how many. ValueError for files or values that are not what they should be."""
    if output.suffix.lower() != ".png" or not output.parent.is_dir():
        raise ValueError(f"got {output}; what is written is a .png file in a folder that is there")
    for name, got, most in (("count", count, MOST), ("steps", steps, MOST_STEPS)):
        if not 1 <= got <= most:
            raise ValueError(f"--{name}: got {got}; allowed are 1 to {most}")
    if not 0 <= guidance <= 100:
        raise ValueError(f"--guidance: got {guidance}; allowed are 0 to 100; 1 is none")
    folder = torch_folder(folder)
    values = read_config(folder)
    if values.get("model_type") != MODEL_TYPE or values.get("prediction") not in PATHS:
        raise ValueError(
            f"{folder} holds a {values.get(KEY, values.get('model_type'))!r}; draw takes what task: "
            f"image_generation trained, whose config.json says its prediction ({listed(PATHS)})"
        )
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model = load_exported(folder, dtype=torch.float32, device=device)
    wanted = _numbers(model.config, labels).repeat_interleave(count)
    if len(wanted) > MOST:
        raise ValueError(
            f"--count: got {count} of {len(wanted) // count} labels; allowed are {MOST} pictures"
        )
    pictures = model.config.pictures()
    noise = torch.randn(
        len(wanted), pictures.channels, pictures.size, pictures.size,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    with packed_op_only(model):
        made = sampled(model, PATHS[values["prediction"]], wanted, noise, steps, guidance)
    write_bytes(output, pictures.sheet(made, count))
    return len(made)


def _numbers(config: Any, labels: Sequence[str]) -> torch.Tensor:
    """The numbers of labels by name; where none is named the first ones, or, of a model without any, what
    stands for none. ValueError for another name."""
    known = {str(name): int(number) for number, name in config.id2label.items()}
    if labels and not known:
        raise ValueError(f"--label: got {labels[0]!r}, and it was trained without labels; leave it out")
    for label in labels:
        if label not in known:
            some = list(known)[:20]
            raise ValueError(
                f"--label: got {label!r}; allowed: {listed(some)}{' and more' if len(known) > 20 else ''}"
                f"{did_you_mean(label, known)}"
            )
    first = sorted(known.values())[:FIRST] or [config.classes]
    return torch.tensor([known[label] for label in labels] or first)
