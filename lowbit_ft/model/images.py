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
from .hub import refuse_irregular

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")


def read_processor(folder: str | Path) -> Any:
    """The processor of a folder. CheckpointError when none loads, or when it makes other images than the
    model takes by its config.json."""
    from PIL import Image  # optional: only images need it
    from transformers import AutoConfig, AutoImageProcessor  # slow

    refuse_irregular(Path(folder))
    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil", **options)
        made = pixels(processor, Image.new("RGB", (8, 8)))
    except Exception as error:  # a damaged file raises anything
        raise CheckpointError(
            f"{folder}: its image processor cannot be loaded ({type(error).__name__}: {error}). The folder "
            "needs preprocessor_config.json"
        ) from error
    config = AutoConfig.from_pretrained(str(folder), **options)
    size = getattr(config, "image_size", None)
    if size is None:  # it takes any; those of a batch are one tensor
        other = list(pixels(processor, Image.new("RGB", (8, 16))).shape)
        if other != list(made.shape):
            raise CheckpointError(
                f"{folder}: preprocessor_config.json makes images of {list(made.shape)} and of {other} "
                "(channels, height, width), as the pictures are, and those of a batch must be of one size; "
                'set "size": {"height": ..., "width": ...} there, and "do_pad": false'
            )
        return processor
    wanted = [config.num_channels, *((size, size) if isinstance(size, int) else size)]
    if list(made.shape) != wanted:
        raise CheckpointError(
            f"{folder}: preprocessor_config.json makes images of {list(made.shape)} (channels, height, "
            f"width), and the model takes {wanted} by its config.json; set size there"
        )
    return processor


def made_size(folder: str | Path) -> tuple[int, int] | None:
    """(height, width) of what the image processor of a folder makes; None where there is none."""
    from PIL import Image  # optional: only images need it

    if not (Path(folder) / "preprocessor_config.json").is_file():
        return None
    height, width = pixels(read_processor(folder), Image.new("RGB", (8, 8))).shape[1:]
    return height, width


def pixels(processor: Any, picture: Any) -> Tensor:
    """A picture of Pillow -> fp32 [C, H, W], as the model takes it."""
    return processor(picture, return_tensors="pt")["pixel_values"][0]


def picture_of(data: bytes) -> Any:
    """The picture in the bytes of a file, the right way up, in RGB."""
    from PIL import Image, ImageOps  # optional: only images need it

    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) of the picture in the bytes of a file, the right way up. Only its header is read."""
    from PIL import Image  # optional: only images need it

    image = Image.open(io.BytesIO(data))
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF's orientations on the side
    width, height = image.size
    return (height, width) if turned else (width, height)


def problem_of(data: bytes) -> str | None:
    """Why these bytes are no picture; None when they are."""
    from PIL import Image  # optional: only images need it

    try:
        Image.open(io.BytesIO(data)).verify()
    except Exception as error:  # Pillow's readers raise anything for a damaged file
        return f"{type(error).__name__}: {error}"
    return None


def patches(config: Mapping[str, Any]) -> int | None:
    """Tokens that config.json says an image becomes, with the one that stands for all of it; None where it
    says nothing of images."""
    sides = []
    for value in (config.get("image_size"), config.get("patch_size")):
        side = (value, value) if isinstance(value, int) else value
        if not isinstance(side, list | tuple) or len(side) != 2:
            return None
        sides.append(side)
    (height, width), (patch_height, patch_width) = sides
    return (height // patch_height) * (width // patch_width) + 1
