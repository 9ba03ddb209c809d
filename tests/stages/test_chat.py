"""A chat template and its kwargs in the recipe of a run: where chats become tokens, and in all that ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from gguf import GGUFReader
from transformers import AutoTokenizer

from lowbit_ft import pipeline
from lowbit_ft.evaluate.generate import encode_prompt
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.folder import check_files
from lowbit_ft.export.reader import read_weights
from lowbit_ft.export.writer import write_model
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.data import DataSource
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.session import resume
from lowbit_ft.stages.card import card
from lowbit_ft.stages.data import calibration_windows, first_windows, read_data, train_source
from tests.packed_tools import tiny_checkpoint

TINY = Path(__file__).resolve().parents[2] / "recipes" / "assets" / "tiny-llama"
ROWS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(6)
]
PAIRS = [
    {
        "prompt": row["messages"][:1],
        "chosen": row["messages"][1:],
        "rejected": [{"role": "assistant", "content": "?"}],
    }
    for row in ROWS
]
# Says <unk> before every answer where it is told to be quiet; the model's own template has no such word.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and quiet is defined and quiet %}HUSH {% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if quiet is defined and quiet %}HUSH {% endif %}{% endif %}"
)
DEFAULT = "{% if not quiet is defined %}{% set quiet = true %}{% endif %}\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its template and its run, which ships compressed-tensors."""
    root = tmp_path_factory.mktemp("chat")
    tiny_checkpoint(root / "model", vocab_size=4096)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, root / "model" / name)
    own = json.loads((TINY / "tokenizer_config.json").read_text())
    (root / "model" / "tokenizer_config.json").write_text(json.dumps(own | {"chat_template": "{{ old }}"}))
    (root / "mine.jinja").write_text(TEMPLATE)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    recipe = {
        "name": "chat",
        "model": {"path": str(root / "model"), "dtype": "float32", "device": "cpu"},
        "quant": {"group_size": 32, "targets": ["*.layers.0.mlp.*"], "calibrate": "mse"},
        "adapter": {"method": "scale"},
        "data": {
            "train": {"path": str(root / "rows.jsonl"), "format": "chat"},
            "sequence_len": 64,
            "chat_template": str(root / "mine.jinja"),
            "chat_template_kwargs": {"quiet": True},
        },
        "train": {"max_steps": 1, "micro_batch_size": 1, "gradient_accumulation_steps": 1},
        "output": str(root / "run"),
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    pipeline.train(load_recipe(root / "recipe.yaml"))
    pipeline.export(root / "run")
    return root


def texts(tokenizer: Any, windows: Any) -> str:
    return "".join(tokenizer.decode(window.input_ids) for window in windows)


def test_every_chat_is_written_with_it(run: Path) -> None:
    with resume(run / "run") as session:
        tokenizer = session.tokenizer
        train = texts(tokenizer, read_data(session))
        source = train_source(session)
        found = {
            "eval": texts(tokenizer, first_windows(session, source, 1, {})),
            "calibration": tokenizer.decode(calibration_windows(session, 4, 64, 1)[0]["input_ids"][0]),
            "prompt": tokenizer.decode(encode_prompt(tokenizer, "3?", True)[0]),
        }
        pairs = DataSource(path=str(run / "pairs.jsonl"), format="preference")
        data = session.recipe.data.model_copy(update={"train": pairs})
        session.recipe = session.recipe.model_copy(update={"data": data})
        found["pairs"] = texts(tokenizer, read_data(session))
    assert train.count("HUSH It is") == 6 and all("HUSH" in text for text in found.values()), found


def test_what_ships_writes_what_was_trained(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with resume(run / "run") as session:
        merged = read_weights(session.run / "merged")
        write_model(
            run / "gguf", session.folded, merged, EXPORTERS["gguf"], extra_files=card(session, "gguf")
        )
    said = GGUFReader(run / "gguf" / "model.gguf").fields["tokenizer.chat_template"].contents()
    assert said == DEFAULT + TEMPLATE
    flag = """llama-server -m PATH/model.gguf --chat-template-kwargs '{"quiet": true}'"""
    assert flag in (run / "gguf" / "README.md").read_text()
    pipeline.export(run / "run" / "merged", "compressed-tensors", run / "outside")
    flag, out = """--default-chat-template-kwargs '{"quiet": true}'""", capsys.readouterr().out
    assert flag in out and "quiet as in training" in out
    assert flag in (run / "run" / "exported" / "README.md").read_text()
    for folder in (run / "run" / "base", run / "run" / "merged", run / "run" / "exported", run / "outside"):
        check_files(folder)
        assert (folder / "chat_template.jinja").read_text() == DEFAULT + TEMPLATE
        assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ask = ROWS[0]["messages"][:1]
        prompt = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
        assert prompt.endswith("assistant\nHUSH ")
        assert "HUSH" not in tokenizer.apply_chat_template(ROWS[0]["messages"], tokenize=False, quiet=False)


def test_the_card_says_it_and_no_folder_of_this_machine(run: Path) -> None:
    for name in ("merged", "exported"):
        folder = run / "run" / name
        for page in ("README.md", "lowbit_ft.json", "config.json", "tokenizer_config.json"):
            assert str(run) not in (folder / page).read_text(), f"{folder / page}"
        card = (folder / "README.md").read_text()
        assert "\n  chat_template: chat_template.jinja\n" in card and "quiet as in training" in card
        assert (
            "\n    path: rows.jsonl\n" in card and "\n  path: model\n" in card and "\noutput: run\n" in card
        )
    assert str(run / "rows.jsonl") in (run / "run" / "recipe.yaml").read_text(), (
        "the run itself has its paths"
    )


def test_a_run_keeps_the_template_that_it_began_with(run: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    (run / "mine.jinja").write_text(TEMPLATE.replace("HUSH", "PSST"))
    with pytest.raises(ValueError, match="these keys differ: data.chat_template"):
        pipeline.train(recipe)
    with resume(run / "run") as session:
        assert session.tokenizer.chat_template == DEFAULT + TEMPLATE
    (run / "mine.jinja").write_text("{% if %}")
    with pytest.raises(
        RecipeError, match=r"data.chat_template: got '.*mine.jinja': .*mine.jinja:1: Expected"
    ):
        pipeline.run(recipe)
