"""What a config.json of diffusers is called by here, and what its class was called before."""

from __future__ import annotations

import importlib.util
from typing import Any

MODEL_TYPE = "diffusers_transformer"  # of config.json, where diffusers itself has none
ARCHITECTURE = "DiffusersTransformer"
AUTO = "AutoModelForImageToImage"  # the auto class of transformers that builds it: a noisy image in, one out
KEY = "_class_name"
WEIGHTS = "diffusion_pytorch_model"  # what diffusers calls its files of tensors
EXTRA = "diffusion"

# What older files call it, by (class, norm_type): as diffusers itself reads them.
FORMER = {("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel"}


def recognised(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of diffusers with the model_type that it does not write; any other as it is."""
    if KEY not in config:
        return config
    name, norm = config[KEY], config.get("norm_type")
    if not isinstance(name, str):
        name = repr(name)  # of no class, which who builds one says
    former = FORMER.get((name, norm), name) if isinstance(norm, str) else name
    return config | {KEY: former, "model_type": MODEL_TYPE}


def missing() -> str | None:
    """What to install before a model can be built; None: nothing."""
    if importlib.util.find_spec("diffusers") is None:
        return f"needs diffusers, which is not installed: pip install 'lowbit-ft[{EXTRA}]'"
    return None
