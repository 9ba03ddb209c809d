"""Tell transformers of the transformers of diffusers, only when somebody opens one."""

from collections.abc import Mapping
from typing import Any

from .names import AUTO, MODEL_TYPE


def register(config: Mapping[str, Any]) -> None:
    """Where this config.json is of one: asked for by who opens the folder, so that nothing happens on
    import."""
    if config.get("model_type") != MODEL_TYPE:
        return
    import transformers  # slow: seconds

    from .config import DiffusersConfig  # slow: transformers
    from .transformer import DiffusersTransformer  # slow: transformers

    transformers.AutoConfig.register(MODEL_TYPE, DiffusersConfig, exist_ok=True)
    getattr(transformers, AUTO).register(DiffusersConfig, DiffusersTransformer, exist_ok=True)
