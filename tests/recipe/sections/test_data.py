"""The data section: files, lengths and chat templates that are not there."""

import shutil
from pathlib import Path

from lowbit_ft.cli.init import write_recipe
from lowbit_ft.recipe.recipe import load_recipe
from tests.recipe.recipe_text import (
    GOOD,
    TINY,
    bad_recipes,
    refused,
    refused_with,
)

BAD = [
    # (what, changed text, overrides, place and words that must be in one line)
    ("missing", ("    format: chat\n", ""), (), "r.yaml:13: data.train.format: missing; add `format: ...`"),
    (
        "no such data",
        ("train.jsonl", "trian.jsonl"),
        (),
        "there is no such file; did you mean 'train.jsonl'?",
    ),
    ("glob without files", ("train.jsonl", "*.parquet"), (), "no file matches"),
    (
        "window beyond the model",
        ("sequence_len: 256", "sequence_len: 2048"),
        (),
        "r.yaml:16: data.sequence_len: got 2048; allowed: at most the 1024 positions",
    ),
]


@bad_recipes(BAD)
def test_bad_recipe_is_refused_with_its_line(change, overrides, words):
    refused_with(change, overrides, words)


def test_chat_needs_a_template(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").unlink()
    (problem,) = refused(GOOD.replace(str(TINY), str(folder)))
    assert (
        problem.startswith("r.yaml:15: data.train.format: got 'chat', but") and "no chat template" in problem
    )
    write_recipe(str(folder), Path("plain.yaml"))
    assert load_recipe("plain.yaml", check=False).data.train.format == "text"


def test_chat_needs_a_tokenizer(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    (problem,) = refused(GOOD.replace(str(TINY), str(folder)))
    assert (
        problem.startswith("r.yaml:3: model.path: got ")
        and "which has no tokenizer (tokenizer.json" in problem
    )
