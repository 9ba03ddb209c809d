"""The tokenizer of a model folder, as transformers loads it, without code of the folder's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files.tensorfile import CheckpointError
from .hub import refuse_irregular


def pad_id(tokenizer: Any) -> int:
    """The padding token; pads are never targets, so the end-of-text token or 0 does as well."""
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((i for i in ids if i is not None), 0)  # an image processor has neither


def read_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder. CheckpointError when none loads, or when what loads encodes nothing: a value
    of tokenizer_config.json may be of a kind that only shows then."""
    from transformers import AutoTokenizer

    refuse_irregular(Path(folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        tokenizer("a")
        length = tokenizer.model_max_length
        if not isinstance(length, int | float) or not length > 0:
            raise ValueError(f"model_max_length: got {length!r}; allowed: a number")
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged tokenizer.json
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {error}). "
            "The folder needs tokenizer.json (or its older files) and tokenizer_config.json."
        ) from error
    return tokenizer
