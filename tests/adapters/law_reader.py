"""The other process of the law: reads merged weights from a file and reports their digests. Run as `python
-m`, not a test.
"""

import hashlib
import json
import sys

import torch
from safetensors import safe_open

from lowbit_ft.grid import WEIGHTS, Weight, grid_from_json


def fingerprint(weight: Weight) -> list[str]:
    """The digest of the packed tensors, and the sha256 of the dense weight in fp32 and in bf16."""
    dense = [
        weight.dequantize(dtype).contiguous().view(torch.uint8) for dtype in (torch.float32, torch.bfloat16)
    ]
    return [weight.digest(), *(hashlib.sha256(d.numpy().data).hexdigest() for d in dense)]


def read(path: str) -> dict[str, list[str]]:
    """Case name -> fingerprint of every weight in the file."""
    out = {}
    with safe_open(path, "pt") as file:
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for key in file.keys():  # noqa: SIM118  safe_open is not a mapping
            case, _, name = key.rpartition("/")
            tensors.setdefault(case, {})[name] = file.get_tensor(key)
        for case, facts in file.metadata().items():
            facts = json.loads(facts)
            grid = grid_from_json(facts["grid"])
            out[case] = fingerprint(
                WEIGHTS[grid.kind].from_tensors(tensors[case], tuple(facts["shape"]), grid)
            )
    return out


if __name__ == "__main__":
    json.dump(read(sys.argv[1]), sys.stdout)
