"""The tokenizer against the rows of the embedding, when the recipe loads."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lowbit_ft.data.errors import DataError
from lowbit_ft.data.examples import load_examples
from lowbit_ft.export.gguf_tokenizer import reject
from lowbit_ft.recipe.recipe import load_recipe
from tests.recipe.recipe_text import GOOD, TINY, refused, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny Llama with two tokens more in its tokenizer, and the embedding as it was."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 4096
    tokenizer.add_tokens(["<tool_a>", "<tool_b>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


WORDS = (
    "whose tokenizer has 4098 tokens (up to id 4097) and whose embedding has 4096 rows: none for '<tool_a>', "
    "'<tool_b>'; give the model rows for them (model.resize_token_embeddings(len(tokenizer))"
)


@pytest.mark.parametrize("format", ["compressed-tensors", "native", "gguf"])
def test_more_tokens_than_rows_are_refused(folder: Path, format: str) -> None:
    text = GOOD.replace(str(TINY), str(folder))
    problems = refused(text, (f"export.format={format}",))
    assert any(p.startswith("r.yaml:3: model.path: got ") and WORDS in p for p in problems), problems
    if format == "gguf":
        (reason,) = reject(folder, 4096)
        assert "has token 4097 ('<tool_b>'), and the model 4096 embeddings" in reason
        assert reject(folder, 4098) == [] and any("4096 embeddings" in p for p in problems)


def test_a_special_token_without_a_row_is_refused(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<tool_a>"}))
    assert any(WORDS in problem for problem in refused(GOOD.replace(str(TINY), str(folder))))


def test_a_token_of_images_has_no_row_and_text_needs_none(folder: Path, tmp_path: Path) -> None:
    """Gemma 3 of one billion is such: its tokenizer is that of the models that see."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"image_token": "<tool_a>", "audio_token": "<tool_b>"}
    path.write_text(json.dumps(config))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "hello"}\n{"text": "see <tool_b>"}\n')
    text = GOOD.replace(str(TINY), str(folder))
    given = [f"data.train={{path: {rows}, format: text}}", "data.valid=null", "data.train_on=all"]
    recipe_file = write(text)
    with pytest.raises(
        ValueError, match=r"rows\.jsonl.*2.*token 4097 has no row in the model's embedding of"
    ):
        load_recipe(recipe_file, given)
    rows.write_text('{"text": "hello"}\n')
    recipe = load_recipe(recipe_file, given)
    rows.write_text('{"text": "hello"}\n' * 30 + '{"text": "see <tool_b>"}\n')  # beyond the first rows
    recipe = load_recipe(recipe_file, given)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(DataError, match="its token 4097 has no row in the model's embedding of 4096"):
        load_examples(recipe.data.train, recipe.data, tokenizer, rows=4096)
    assert len(load_examples(recipe.data.train, recipe.data, tokenizer, rows=4098)) > 0
