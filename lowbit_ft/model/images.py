"""The image processor of a model folder, as transformers loads it, without code of the folder's own; and the
pictures that it is given.

Its Pillow backend is taken wherever it runs, so that the same picture is the same numbers with and without
torchvision.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.picture import picture_of
from ..files.tensorfile import CheckpointError
from .config import load_config
from .hub import refuse_irregular

MOST_SIDE = 1 << 13  # pixels of what an image processor makes
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")


def read_processor(folder: str | Path) -> Any:
    """The processor of a folder. CheckpointError when none loads, or when it makes other images than the
    model takes by its config.json (of a convolutional network, and of one that names no size, any size will
    do), or images of several sizes, which are no batch."""
    from PIL import Image  # optional: only images need it
    from transformers import AutoImageProcessor  # slow

    refuse_irregular(Path(folder))
    config = load_config(folder)
    if (own := getattr(config, "pictures", None)) is not None:  # of diffusers: config.json says what it takes
        return own()
    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil", **options)
        _refuse_huge(processor)
        made, wide = (list(pixels(processor, Image.new("RGB", (x, 8))).shape) for x in (8, 16))
    except Exception as error:  # a damaged file raises anything
        raise CheckpointError(
            f"{folder}: its image processor cannot be loaded ({type(error).__name__}: {error}). The folder "
            "needs preprocessor_config.json"
        ) from error
    if made != wide:
        raise CheckpointError(
            f"{folder}: preprocessor_config.json makes images of {made} and {wide} (channels, height, width) "
            "of pictures of two shapes, and a batch has one; set size (height and width), or do_center_crop, "
            "and do_pad: false there"
        )
    known = config.to_dict()
    size, channels = known.get("image_size") if _sized(known) else None, known.get("num_channels", made[0])
    sides = made[1:] if size is None else [size, size] if isinstance(size, int) else list(size)
    if made != [channels, *sides]:
        raise CheckpointError(
            f"{folder}: preprocessor_config.json makes images of {made} (channels, height, width), and the "
            f"model takes {[channels, *sides]} by its config.json; set size there"
        )
    return processor


def _refuse_huge(processor: Any) -> None:
    """ValueError for a side of which even one picture would not fit in memory."""
    for key in ("size", "crop_size", "pad_size"):
        for name, side in dict(getattr(processor, key, None) or {}).items():
            if isinstance(side, int | float) and not 0 <= side <= MOST_SIDE:
                raise ValueError(f"{key}: {name} is {side}; allowed: up to {MOST_SIDE:,} pixels")


def made_size(folder: str | Path) -> tuple[int, int] | None:
    """(height, width) of what the image processor of a folder makes; None where there is none."""
    from PIL import Image  # optional: only images need it

    if not (Path(folder) / "preprocessor_config.json").is_file():
        return None
    height, width = pixels(read_processor(folder), Image.new("RGB", (8, 8))).shape[1:]
    return height, width


def _sized(config: Mapping[str, Any]) -> bool:
    """Whether a model is made for images of one size: one that attends. Of a convolutional network the size
    in config.json, where there is one, is what it was trained on."""
    return bool(config.get("num_attention_heads") or config.get("num_heads"))


def pixels(processor: Any, picture: Any) -> Tensor:
    """A picture of Pillow -> fp32 [C, H, W], as the model takes it."""
    return processor(picture, return_tensors="pt")["pixel_values"][0]


def alike(processor: Any, other: Any) -> bool:
    """Whether two processors make the same numbers of a picture."""
    from PIL import Image  # optional: only images need it

    if not (callable(processor) and callable(other)):
        return processor == other  # of diffusers
    picture = Image.linear_gradient("L").convert("RGB").crop((0, 0, 200, 180))
    return torch.equal(pixels(processor, picture), pixels(other, picture))


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) of the picture in the bytes of a file, the right way up. Only its header is read."""
    from PIL import Image  # optional: only images need it

    image = Image.open(io.BytesIO(data))
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF's orientations on the side
    width, height = image.size
    return (height, width) if turned else (width, height)


def problem_of(data: bytes) -> str | None:
    """Why these bytes are no picture; None when they are. They are decoded: a file that is cut off still has
    a good beginning, and training would stop at it."""
    try:
        picture_of(data, small=True)
    except Exception as error:  # Pillow's readers raise anything for a damaged file
        return f"{type(error).__name__}: {error}"
    return None


def patches(config: Mapping[str, Any]) -> int | None:
    """Tokens that config.json says an image becomes, with the one that stands for all of it, which a model of
    diffusers (sample_size) has not; None where it says nothing of images."""
    sides, own = [], config.get("image_size")
    for value in (config.get("sample_size") if own is None else own, config.get("patch_size")):
        side = (value, value) if isinstance(value, int) else value
        if not isinstance(side, list | tuple) or len(side) != 2:
            return None
        if not all(type(one) is int and one > 0 for one in side):
            return None  # what is wrong with it, the model says that is built of it
        sides.append(side)
    (height, width), (patch_height, patch_width) = sides
    return (height // patch_height) * (width // patch_width) + (own is not None)
