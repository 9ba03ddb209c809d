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

from torch import Tensor

from ..files.tensorfile import CheckpointError
from .config import load_config
from .hub import refuse_irregular

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")


def read_processor(folder: str | Path) -> Any:
    """The processor of a folder. CheckpointError when none loads, or when it makes other images than the
    model takes by its config.json."""
    from PIL import Image  # optional: only images need it
    from transformers import AutoImageProcessor  # slow

    refuse_irregular(Path(folder))
    config = load_config(folder)
    if (own := getattr(config, "pictures", None)) is not None:  # of diffusers: config.json says what it takes
        return own()
    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil", **options)
        made = pixels(processor, Image.new("RGB", (8, 8)))
    except Exception as error:  # a damaged file raises anything
        raise CheckpointError(
            f"{folder}: its image processor cannot be loaded ({type(error).__name__}: {error}). The folder "
            "needs preprocessor_config.json"
        ) from error
    size = config.image_size
    wanted = [config.num_channels, *((size, size) if isinstance(size, int) else size)]
    if list(made.shape) != wanted:
        raise CheckpointError(
            f"{folder}: preprocessor_config.json makes images of {list(made.shape)} (channels, height, "
            f"width), and the model takes {wanted} by its config.json; set size there"
        )
    return processor


def pixels(processor: Any, picture: Any) -> Tensor:
    """A picture of Pillow -> fp32 [C, H, W], as the model takes it."""
    return processor(picture, return_tensors="pt")["pixel_values"][0]


def picture_of(data: bytes) -> Any:
    """The picture in the bytes of a file, the right way up, in RGB."""
    from PIL import Image, ImageOps  # optional: only images need it

    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def problem_of(data: bytes) -> str | None:
    """Why these bytes are no picture; None when they are."""
    from PIL import Image  # optional: only images need it

    try:
        Image.open(io.BytesIO(data)).verify()
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
        sides.append(side)
    (height, width), (patch_height, patch_width) = sides
    return (height // patch_height) * (width // patch_width) + (own is not None)
