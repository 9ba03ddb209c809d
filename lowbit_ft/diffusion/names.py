"""Which classes of diffusers are read, by the `_class_name` of their config.json; and what they are called
here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "diffusers_transformer"  # of config.json, where diffusers itself has none
ARCHITECTURE = "DiffusersTransformer"
AUTO = "AutoModelForImageToImage"  # the auto class of transformers that builds it: a noisy image in, one out
KEY = "_class_name"
WEIGHTS = "diffusion_pytorch_model"  # what diffusers calls its files of tensors
EXTRA = "diffusion"

# Class -> what its forward takes, and what of it training is given: all of a transformer of classes; of one
# that looks at the states of a text encoder, nothing.
CLASSES: dict[str, bool] = {
    "DiTTransformer2DModel": True,
    "SD3Transformer2DModel": False,
    "FluxTransformer2DModel": False,
}


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a transformer of diffusers."""
    return KEY in config


def recognised(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the model_type that diffusers does not write; any other as it is."""
    return config | {"model_type": MODEL_TYPE} if is_ours(config) else config


def missing() -> str | None:
    """What to install before a model can be built; None: nothing."""
    if importlib.util.find_spec("diffusers") is None:
        return f"needs diffusers, which is not installed: pip install 'lowbit-ft[{EXTRA}]'"
    return None
