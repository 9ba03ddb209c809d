"""The folder of a model with new tokens (model.add_tokens): its config.json, its tokenizer and whatever else
belongs to the model, but no weights. Every folder that is written later copies these files from here.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.atomic import staged_folder
from ..files.errors import writing
from ..files.manifest import MANIFEST, file_entry, sealed
from ..model.checkpoint import Checkpoint
from ..model.config import CONFIG, read_config
from .folder import check_target, copied_files, write_json

# What `save_pretrained` of a tokenizer writes, in one form or another.
TOKENIZER = ("token", "special_tokens", "added_tokens", "vocab", "merges", "tekken", "chat_template")


def write_grown(
    folder: Path, checkpoint: Checkpoint, tokenizer: Any, rows: int, beside: Mapping[str, Any]
) -> None:
    """Write it, in the place of one of ours that was there. rows: of its tables; beside: further keys of
    config.json. ValueError when something else is there."""
    check_target(folder)
    config = read_config(checkpoint.folder)
    inner = config.get("text_config")
    holder = inner if isinstance(inner, dict) and "vocab_size" in inner else config
    holder["vocab_size"] = rows
    config |= beside
    with writing(folder), staged_folder(folder) as stage:
        for path in copied_files(checkpoint.folder):
            if not path.name.startswith(TOKENIZER) and path.suffix not in (".model", ".tiktoken"):
                shutil.copyfile(path, stage / path.name)
        tokenizer.save_pretrained(stage)
        write_json(stage / CONFIG, config)
        files = {path.name: file_entry(path) for path in sorted(stage.iterdir())}
        manifest = {"writer": "lowbit_ft", "version": 1, "format": "tokenizer", "files": files, "layers": {}}
        (stage / MANIFEST).write_bytes(sealed(manifest))
