"""compressed-tensors without our package: transformers alone computes equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lowbit_ft.export.writer import write_model
from lowbit_ft.model.checkpoint import Checkpoint
from tests.integrations.loading import COMPRESSED, in_a_new_process
from tests.packed_tools import IDS, int_grid, packed_model, random_weights, tiny_checkpoint

WITHOUT_US = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
out, ids = {}, torch.arange(3, 40)[None]
for name, folder, asymmetric in json.loads(sys.argv[1]):
    for dtype in ("float32", "bfloat16"):
        for dequantize in {asymmetric, True} if "mixed" not in name else {False}:
            options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
            options["dtype"] = getattr(torch, dtype)
            model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
            with torch.no_grad():
                out[f"{name} {dtype} {dequantize}"] = model(ids).logits.contiguous()
assert not any(name.startswith("lowbit") for name in sys.modules)
save_file(out, sys.argv[2])
"""


def test_compressed_tensors_loads_without_our_package_with_equal_logits(tmp_path: Path) -> None:
    """Every bit width, symmetric and asymmetric, fp32 and bf16, in both modes of transformers that can read
    it.
    """
    source = tiny_checkpoint(tmp_path / "dense")
    cases: dict[str, Any] = {
        f"W{bits} {'sym' if symmetric else 'asym'}": int_grid(bits=bits, symmetric=symmetric)
        for bits in (2, 3, 4, 8)
        for symmetric in (True, False)
    }
    cases["row"] = int_grid(bits=3, group_size=-1)
    cases["mixed"] = {
        "down_proj": int_grid(bits=8, group_size=-1),
        "v_proj": int_grid(bits=2),
        "": int_grid(bits=3),
    }
    expected, folders = {}, []
    for name, grid in cases.items():
        asymmetric = not isinstance(grid, dict) and not grid.symmetric
        folders.append((name, str(tmp_path / name), asymmetric))
        for dtype in ("float32", "bfloat16"):
            checkpoint = Checkpoint.open(source, dtype=dtype)
            weights = random_weights(checkpoint.empty_model(), grid)
            if dtype == "float32":
                write_model(tmp_path / name, checkpoint, weights, COMPRESSED)
            with torch.no_grad():
                expected[f"{name} {dtype}"] = packed_model(checkpoint, weights)(IDS).logits
    in_a_new_process(WITHOUT_US, json.dumps(folders), tmp_path / "logits.safetensors")
    found = load_file(tmp_path / "logits.safetensors")
    assert {key.rpartition(" ")[0] for key in found} == set(expected) and len(found) == 2 * (
        4 + 4 * 2 + 2 + 1
    )
    different = [
        key for key, logits in found.items() if not torch.equal(logits, expected[key.rpartition(" ")[0]])
    ]
    assert different == []
