"""Low-bit caches on a real small model: bytes, perplexity, text, and what they cost. One thread, a minute.

    python -m benchmarks.kv_cache                 measures, and writes the table of docs/kv-cache.md
    python -m benchmarks.kv_cache --render        the table again, from benchmarks/results/kv_cache.json

For every cache: the bytes of a token as they are counted in the cache; the perplexity of the same text by one
forward without a cache (what training and the table of a run see) and through the cache, eight tokens at a
time; how many greedy tokens are the same with the cache and without; processor seconds, the least of
--rounds, interleaved, of a forward and backward of 8 x 256 tokens, and of one token at length 512.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit_ft.files.atomic import write_text
from lowbit_ft.kv_cache import KVConfig, place_kv_cache
from lowbit_ft.kv_cache.cache import cache_bytes

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "kv_cache.json", HERE.parent / "docs" / "kv-cache.md"
ASSETS = HERE.parent / "recipes" / "assets"
CACHES: dict[str, KVConfig | None] = {
    "none": None,
    "`token_head`, 8 bits": KVConfig.of(8, "token_head"),
    "`token_head`, 4 bits": KVConfig.of(4, "token_head"),
    "the same with `rotate: false`": KVConfig.of(4, "token_head", rotate=False),
    "`block`, 8 bits": KVConfig.of(8, "block"),
    "`block`, 4 bits": KVConfig.of(4, "block"),
    "`token`, 4 bits": KVConfig.of(4, "token"),
}
WINDOWS, LENGTH, NEW = 8, 256, 24


def windows(tokenizer: Any) -> Tensor:
    """Held-out text, [WINDOWS, LENGTH]."""
    lines = (ASSETS / "text" / "valid.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(line)["text"] for line in lines)[: 8 * WINDOWS * LENGTH]
    ids = tokenizer(text)["input_ids"]
    return torch.tensor(ids[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)


def perplexity(logits: Tensor, ids: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp())


@torch.no_grad()
def quality(model: Any, ids: Tensor) -> dict[str, Any]:
    cache, parts = None, []
    for piece in ids.split(8, 1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    options: dict[str, Any] = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(ids[:4, :32])
    texts = [
        model.generate(ids[:4, :32], attention_mask=mask, use_cache=cached, **options)[:, 32:]
        for cached in (True, False)
    ]
    return {
        "bytes": cache_bytes(cache) / ids.numel(),
        "forward": perplexity(model(ids, use_cache=False).logits, ids),
        "cached": perplexity(torch.cat(parts, 1), ids),
        "same": int((texts[0] == texts[1]).sum()),
        "tokens": texts[0].numel(),
    }


def seconds(model: Any, ids: Tensor) -> tuple[float, float]:
    """Processor seconds of a forward and backward, and of a token at length 512."""
    start = time.process_time()
    model(ids[:8], use_cache=False).logits.mean().backward()
    step, start = time.process_time() - start, 0.0
    model.zero_grad()
    with torch.no_grad():
        cache = model(ids[:2].reshape(1, -1), use_cache=True).past_key_values
        start = time.process_time()
        for i in range(16):
            model(ids[:1, i : i + 1], past_key_values=cache)
    return step, (time.process_time() - start) / 16


def measure(rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    path = str(ASSETS / "tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = windows(AutoTokenizer.from_pretrained(path))
    rows = {}
    for name, config in CACHES.items():
        place_kv_cache(model, config)
        rows[name] = {"cache": name, **quality(model, ids)}
        print(rows[name], flush=True)
    for _ in range(rounds):
        for name, config in CACHES.items():
            place_kv_cache(model, config)
            for key, value in zip(("step", "decode"), seconds(model, ids), strict=True):
                rows[name][key] = min(value, rows[name].get(key, value))
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> list[str]:
    names = ("cache", "bytes", "perplexity, forward", "cached", "same tokens", "step, s", "decode, ms")
    lines = [f"| {' | '.join(names)} |", f"| --- |{' --: |' * (len(names) - 1)}"]
    for r in rows:
        cells = f"{r['bytes']:,.0f} | {r['forward']:.4f} | {r['cached']:.4f} | {r['same']} of {r['tokens']}"
        lines.append(f"| {r['cache']} | {cells} | {r['step']:.3f} | {1000 * r['decode']:.1f} |")
    return lines


def render(page: str) -> str:
    """The page with the table between its marks made anew."""
    start, end = "<!-- caches -->\n", "<!-- /caches -->"
    before, found, rest = page.partition(start)
    assert found and end in rest, f"{PAGE.name} has no block for the table"
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return f"{before}{start}\n" + "\n".join(table(rows)) + f"\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--render", action="store_true")
    options = p.parse_args()
    if not options.render:
        found = {"torch": torch.__version__, "rows": measure(options.rounds)}
        write_text(RESULTS, json.dumps(found, indent=1) + "\n")
    write_text(PAGE, render(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
