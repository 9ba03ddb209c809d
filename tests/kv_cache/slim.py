"""What a run with the KV cache kind of CONTRIBUTING.md has to show (tests/test_families.py)."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import DynamicCache

from lowbit_ft.export.reader import load_exported
from lowbit_ft.kv_cache import kv_config_of
from lowbit_ft.kv_cache.cache import cache_bytes


def slim_scales(run: Any) -> None:
    """merged/ says the kind, is loaded with it, and its cache holds 4-bit codes and two bytes for a scale."""
    config = json.loads((run.folder / "merged" / "config.json").read_text())
    assert config["quantization_config"]["kv_cache"]["kind"] == "slim"
    model = load_exported(run.folder / "merged").eval()
    found = kv_config_of(model)
    assert found is not None and (found.kind, found.bits, found.symmetric) == ("slim", 4, True)

    ids, cache = torch.arange(3, 11)[None], DynamicCache()
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        got = torch.cat(
            [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(8)], 1
        )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    text = model.config
    rows = 2 * text.num_hidden_layers * text.num_key_value_heads * ids.shape[1]
    assert cache_bytes(cache) == rows * (text.head_dim // 2 + 2)
