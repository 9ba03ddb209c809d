"""What the tests of the formats share: the grids, a checkpoint with a tokenizer, and the formats that run
everywhere.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from lowbit_ft.export import EXPORTERS
from lowbit_ft.model.checkpoint import Checkpoint
from tests.packed_tools import SIZE, int_grid, tiny_checkpoint

ASSET = Path(__file__).resolve().parents[2] / "recipes" / "assets" / "tiny-llama"
NATIVE, COMPRESSED, GGUF = EXPORTERS["native"], EXPORTERS["compressed-tensors"], EXPORTERS["gguf"]
BOTH = {"native": NATIVE, "compressed-tensors": COMPRESSED}  # their readers are everywhere
OTHERS = [name for name in EXPORTERS if name != "native"]
GRIDS = [
    int_grid(bits=bits, group_size=group, symmetric=symmetric)
    for widths, groups in (((2, 3, 4, 8), (32, 64, 128, 256, -1)), ((6,), (64, 256)))
    for bits, group, symmetric in itertools.product(widths, groups, (True, False))
]
WIDE: dict[str, Any] = SIZE | dict(vocab_size=4096, hidden_size=256)
TINY = WIDE | dict(num_hidden_layers=2)


def checkpoint(folder: Path, config: Any = None, dtype: str = "float32", **changes: Any) -> Checkpoint:
    """A random model with the tokenizer of the small asset."""
    config = config or transformers.LlamaConfig(**(WIDE | changes))
    path = tiny_checkpoint(folder, config)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ASSET / name, path / name)
    return Checkpoint.open(path, dtype=dtype)


def needs_reader(name: str) -> None:
    if reason := EXPORTERS[name].missing(EXPORTERS[name].reads_with):
        pytest.skip(f"{name} {reason}")
