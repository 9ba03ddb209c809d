"""The data section: files, lengths and chat templates that are not there."""

import shutil
from pathlib import Path

import pytest

from lowbit_ft.cli.init import write_recipe
from lowbit_ft.recipe.recipe import RecipeError, load_recipe
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


def test_a_list_of_sources(tmp_path):
    """Read, written and read again; found beside the recipe; refused with its place in the list."""
    rows = '{"prompt": "a", "completion": "b"}\n'
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(rows)
    path = tmp_path / "r.yaml"

    def given(entries: str, *overrides: str):
        text = GOOD.replace(
            GOOD[GOOD.index("  train:") : GOOD.index("  sequence_len")], f"  train: {entries}\n"
        )
        path.write_text(text)
        return load_recipe(path, overrides)

    def refusal(entries: str, *overrides: str) -> str:
        with pytest.raises(RecipeError) as error:
            given(entries, *overrides)
        return "\n".join(error.value.problems)

    a, b = "path: a.jsonl, format: completion", "path: b.jsonl, format: alpaca"
    made = given(f"[{{{a}, weight: 3}}, {{{b}, weight: 1e0}}]", "data.stopping_strategy=all_exhausted")
    assert [source.weight for source in made.data.train] == [3, 1]
    assert [Path(source.path).is_file() for source in made.data.train] == [True, True]  # beside the recipe
    assert made.data.rows.endswith("b.jsonl (alpaca, weight 1), mixed to all_exhausted")
    path.write_text(made.to_yaml())
    assert load_recipe(path) == made
    assert given(f"[{{{a}, weight: 3}}]") == given(f"{{{a}}}")
    assert "r.yaml:13: data.train: got an empty list; allowed: a source, or a list" in refusal("[]")
    assert "data.train.1.wieght: unknown key; did you mean 'weight'?" in refusal(
        f"[{{{a}}}, {{{b}, wieght: 1}}]"
    )
    assert "data.train.1.format: missing; add" in refusal(f"[{{{a}}}, {{path: b.jsonl}}]")
    assert "data.train.0.weight: got 0" in refusal(f"[{{{a}, weight: 0}}, {{{b}}}]")
    assert "data.train.1.path: got 'c.jsonl'; there is no such" in refusal(
        f"[{{{a}}}, {{{b.replace('b.j', 'c.j')}}}]"
    )
    assert "a.jsonl and none for" in refusal(f"[{{{a}, weight: 1}}, {{{b}}}]")
    assert "data.stopping_strategy: got 'all_exhausted' and no weights" in refusal(
        f"[{{{a}}}, {{{b}}}]", "data.stopping_strategy=all_exhausted"
    )
    assert "data.train: got formats completion, text: texts are joined" in refusal(
        f"[{{{a}}}, {{path: b.jsonl, format: text}}]"
    )
    assert "data.train: got formats completion, preference: rows of two" in refusal(
        f"[{{{a}}}, {{path: b.jsonl, format: preference}}]", "train.signal.kind=dpo"
    )
