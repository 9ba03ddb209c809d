"""The section quant.kv_cache: options against each other and against the heads of the model."""

from __future__ import annotations

from types import SimpleNamespace

from transformers import LlamaConfig

from lowbit_ft.kv_cache import KVConfig
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.kv_cache import KVCacheSection, check_kv_cache
from tests.recipe.recipe_text import GOOD, bad_recipes, refused_with, write


def after_bits(text: str) -> tuple[str, str]:
    return ("bits: 4", f"bits: 4\n  kv_cache: {text}")


BAD = [
    (
        "bits that no cache has",
        after_bits("{bits: 2}"),
        (),
        "r.yaml:8: quant.kv_cache.bits: got 2; allowed: 8, 4",
    ),
    (
        "kind that is none",
        after_bits("{kind: tokenhead}"),
        (),
        "got 'tokenhead'; allowed: token_head, token, block; did you mean 'token_head'?",
    ),
    (
        "heads before their rotary embedding",
        after_bits("{where: before_rope}"),
        (),
        "r.yaml:8: quant.kv_cache.where: got 'before_rope': before_rope is LLM-QAT's form",
    ),
    (
        "zero points in blocks",
        after_bits("{kind: block, symmetric: false}"),
        (),
        "quant.kv_cache.symmetric: got False: kind: block has no zero points; leave it out",
    ),
    (
        "a rotated vector",
        after_bits("{kind: token, rotate: true}"),
        (),
        "quant.kv_cache.rotate: got True: only kind: token_head rotates",
    ),
]


@bad_recipes(BAD)
def test_bad_recipe_is_refused_with_its_line(change, overrides, words):
    refused_with(change, overrides, words)


def test_blocks_that_do_not_divide_a_head_are_refused(tmp_path):
    LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1).save_pretrained(tmp_path)
    section = KVCacheSection(kind="block")
    model = SimpleNamespace(path=str(tmp_path), revision=None)
    (problem,) = check_kv_cache(SimpleNamespace(quant=SimpleNamespace(kv_cache=section), model=model))
    assert "head_dim is 16; set kind: token_head" in str(problem)


def test_what_is_left_open_is_as_the_server_of_the_kind_has_it():
    cases = {
        "{}": KVConfig(8, "token_head", "after_rope", True, False),
        "{bits: 4}": KVConfig(4, "token_head", "after_rope", False, True),
        "{bits: 4, kind: block}": KVConfig(4, "block", "after_rope", True, False),
    }
    for text, config in cases.items():
        section = load_recipe(write(GOOD), (f"quant.kv_cache={text}",)).quant.kv_cache
        assert section is not None and section.config() == config
    assert load_recipe(write(GOOD)).quant.kv_cache is None
