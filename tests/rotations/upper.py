"""What a run with the rotation of CONTRIBUTING.md has to show (tests/test_families.py)."""

import json
from typing import Any

import torch
from safetensors.torch import load_file

from tests.checkpoint_tools import TINY


def the_upper_half(run: Any) -> None:
    """What was turned is in the folder that ships too, and the layers that stay dense are turned with it."""
    for folder in ("base", "merged"):
        facts = json.loads((run.folder / folder / "rotation.json").read_text())
        assert facts["r1"] is True and facts["r2"] == [False, False, True, True]
    name = "model.layers.3.self_attn.o_proj.weight"
    shipped, original = load_file(run.shipped / "model.safetensors"), load_file(TINY / "model.safetensors")
    assert not torch.equal(shipped[name], original[name])
