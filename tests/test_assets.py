"""The small model of the quickstart: its turn tokens are trained, so its answers end by themselves."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.continue_asset import chat_tokens, chats_of, read_files, share_that_ends
from lowbit_ft import pipeline
from lowbit_ft.data.chat import ChatTemplate
from lowbit_ft.evaluate.generate import encode_prompt
from lowbit_ft.export.reader import load_exported
from lowbit_ft.model.tokenizer import read_tokenizer
from lowbit_ft.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "recipes" / "assets"
QUICK = ROOT / "recipes" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # the recipe names its assets from here


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return read_tokenizer(ASSETS / "tiny-llama")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_exported(ASSETS / "tiny-llama", dtype=torch.float32)


def ending(tokenizer: Any) -> int:
    """The token that ends a turn of its template."""
    (token,) = ChatTemplate(tokenizer).ending()
    return token


def answer(model: Any, tokenizer: Any, prompt: str, longest: int) -> list[int]:
    """The tokens of the greedy answer, with the one that ends it."""
    asked = encode_prompt(tokenizer, prompt, chat=True)
    given = model.generate(
        asked, attention_mask=torch.ones_like(asked), max_new_tokens=longest, do_sample=False
    )
    return given[0, asked.shape[1] :].tolist()


def test_the_turn_tokens_are_trained_and_end_an_answer(model, tokenizer):
    rows = model.get_input_embeddings().weight[
        tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    ]
    assert not any(torch.equal(rows[i], rows[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert ending(tokenizer) in model.generation_config.eos_token_id


def test_answers_of_the_full_precision_model_end_by_themselves(model, tokenizer):
    recipe = load_recipe(QUICK)
    assert len(recipe.eval.generate) == 3
    for prompt in recipe.eval.generate:
        tokens = answer(model, tokenizer, prompt, recipe.eval.max_new_tokens)
        assert tokens[-1] == ending(tokenizer) and len(tokens) > 1, tokenizer.decode(tokens)


def test_chats_it_has_not_seen_end_by_themselves(model, tokenizer):
    held_out = read_files(ASSETS / "text" / "valid.jsonl")
    chats = chat_tokens(tokenizer, chats_of(held_out, seed=0))[:24]
    assert len(chats) == 24
    assert share_that_ends(model, chats, ending(tokenizer)) >= 0.7


@pytest.mark.slow
@pytest.mark.no_cover
def test_the_samples_of_the_quickstart_end_by_themselves(tmp_path, tokenizer):
    """With a tenth of its steps; with LOWBIT_QUICKSTART=all in the environment, with all of them."""
    steps = [] if os.environ.get("LOWBIT_QUICKSTART") == "all" else ["train.max_steps=15"]
    recipe = load_recipe(QUICK, ["eval.perplexity=false", *steps, f"output={tmp_path / 'run'}"])
    trained = load_exported(pipeline.run(recipe), dtype=torch.float32)
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert [row["prompt"] for row in samples] == recipe.eval.generate
    for row in samples:
        tokens = answer(trained, tokenizer, row["prompt"], recipe.eval.max_new_tokens)
        assert tokens[-1] == ending(tokenizer), tokenizer.decode(tokens)
        assert tokenizer.decode(tokens, skip_special_tokens=True) == row["after"] != ""
