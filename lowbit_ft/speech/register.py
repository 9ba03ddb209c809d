"""Tell transformers of our model, only when somebody opens one."""

from collections.abc import Mapping
from typing import Any

from .names import AUTO, MODEL_TYPE


def register(config: Mapping[str, Any]) -> None:
    """Tell transformers of our model, where this config.json is of one: asked for by who opens the folder, so
    that nothing happens on import."""
    if config.get("model_type") != MODEL_TYPE:
        return
    import transformers  # slow: seconds

    from .codec import SpeechCodec  # slow: transformers
    from .config import SpeechCodecConfig  # slow: transformers

    transformers.AutoConfig.register(MODEL_TYPE, SpeechCodecConfig, exist_ok=True)
    getattr(transformers, AUTO).register(SpeechCodecConfig, SpeechCodec, exist_ok=True)
