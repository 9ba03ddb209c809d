"""draw: pictures of a diffusion transformer in a folder, as one sheet: of classes by name, or of texts by
what an encoder said of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..diffusion.names import KEY, MODEL_TYPE
from ..diffusion.paths import PATHS, Told, sampled
from ..diffusion.texts import MOST as MOST_TEXT
from ..diffusion.texts import Texts
from ..export.reader import load_exported
from ..files.atomic import write_bytes
from ..files.regular import read_regular
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
    texts: Sequence[Path] = (),
    no_text: Path | None = None,
) -> int:
    """Writes `output`, a PNG file with a row of `count` pictures for each label (none: the first ones), or
    for each of the texts, and returns how many. texts, no_text: files as rows name them (diffusion/texts.py);
    the second stands for no text (None: zeros, where the model learned it from those). ValueError for files
    or values that are not what they should be."""
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
    told, without = _asked(model.config, labels, texts, no_text, guidance)
    rows = len(next(iter(told.values())))
    if count * rows > MOST:
        each = "labels" if model.config.texts is None else "texts"
        raise ValueError(f"--count: got {count} of {rows} {each}; allowed are {MOST} pictures")
    told, without = (
        {name: value.repeat_interleave(count, 0) for name, value in one.items()} for one in (told, without)
    )
    pictures = model.config.pictures()
    noise = torch.randn(
        count * rows, pictures.channels, pictures.size, pictures.size,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    with packed_op_only(model):
        made = sampled(model, PATHS[values["prediction"]], told, without, noise, steps, guidance)
    write_bytes(output, pictures.sheet(made, count))
    return len(made)


def _asked(
    config: Any, labels: Sequence[str], texts: Sequence[Path], no_text: Path | None, guidance: float
) -> tuple[Told, Told]:
    """What is told of a picture of each row, and what stands for nothing, of as many."""
    takes = config.texts
    if takes is None:
        if texts or no_text is not None:
            given = ("--text", [*map(str, texts)]) if texts else ("--no-text", str(no_text))
            raise ValueError(f"{given[0]}: got {given[1]}, and this model is told classes; use --label")
        numbers = _numbers(config, labels)
        return {"class_labels": numbers}, {"class_labels": torch.full_like(numbers, config.classes)}
    if labels or not texts:
        raise ValueError(
            f"--label: got {list(labels)}, and this model is told texts; give --text FILE, a .safetensors "
            f"file of {takes.shapes}, as the rows that it was trained on name them"
        )
    if no_text is None and guidance != 1 and getattr(config, "no_text", False):
        raise ValueError(
            f"--guidance: got {guidance:g}, and it learned what no text is from a file (task.no_text), not "
            "from zeros; give that one as --no-text FILE, or --guidance 1"
        )
    read = [_states(takes, place) for place in texts]
    none = takes.without(None if no_text is None else str(no_text))
    told = {name: torch.stack([one[name] for one in read]) for name in takes.shapes}
    return told, {name: value[None].expand(len(read), *value.shape) for name, value in none.items()}


def _states(takes: Texts, place: Path) -> Told:
    try:
        return takes.values(read_regular(place, MOST_TEXT))
    except (OSError, ValueError) as error:
        raise ValueError(f"--text: {place}: {getattr(error, 'strerror', None) or error}") from error


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
