"""docs/kv-cache.md: its keys are those of the recipe, its bytes those of the grids, its kinds the table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from benchmarks import kv_cache
from lowbit_ft.kv_cache import KINDS, KVConfig
from lowbit_ft.recipe.sections.quant import QuantSection

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "kv-cache.md").read_text(encoding="utf-8")


def test_its_recipe_is_one() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    section = QuantSection.model_validate(yaml.safe_load(block)["quant"])
    assert section.kv_cache is not None and section.kv_cache.config() == KVConfig.of(4, "token_head")


def test_bytes_and_kinds_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (\d+) \| (\d+) \|", PAGE, re.M)
    assert {row[0] for row in rows} == set(KINDS)
    for kind, *sizes in rows:
        for bits, size in zip((8, 4), sizes, strict=True):
            assert KVConfig.of(bits, kind).codec(128).row_bytes(4, 128) == 4 * int(size), kind


def test_its_flags_are_those_that_are_printed() -> None:
    shown = [line.strip() for line in PAGE.splitlines() if line.startswith("    ")]
    vllm, _ = KVConfig.of(4, "token_head").served("vllm", "vllm serve RUN/exported")
    llama, _ = KVConfig.of(8, "block").served("llama.cpp", "llama-server -m RUN/exported/model.gguf")
    assert shown == [vllm, llama]


def test_its_figures_are_those_that_were_measured() -> None:
    assert kv_cache.render(PAGE) == PAGE, "run: python -m benchmarks.kv_cache --render"
    rows = {row["cache"]: row for row in json.loads(kv_cache.RESULTS.read_text(encoding="utf-8"))["rows"]}
    assert set(rows) == set(kv_cache.CACHES)
    for row in rows.values():
        assert abs(row["cached"] / row["forward"] - 1) < 1e-5 and row["same"] == row["tokens"]
