"""A recipe's export section: what a format cannot carry is said before anything is loaded, and the line ends
in a file that is served.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from lowbit_ft import pipeline
from lowbit_ft.export import base
from lowbit_ft.export.folder import check_files
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from tests.export.common import ASSET, checkpoint
from tests.line_tools import QUICK


def problems_of(*overrides: str) -> list[str]:
    """What the quickstart recipe is refused for with these overrides; empty when it is not."""
    try:
        load_recipe(ASSET.parents[1] / "quickstart.yaml", overrides)
    except RecipeError as error:
        return error.problems
    return []


def test_a_recipe_learns_of_a_format_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ASSET.parents[2])

    def refused(words: str, *overrides: str) -> None:
        problems = problems_of(f"output={tmp_path / 'run'}", *overrides)
        assert len(problems) == 1 and words in problems[0], problems

    def accepted(*overrides: str) -> None:
        assert problems_of(f"output={tmp_path / 'run'}", *overrides) == []

    alpha = ("quant.grid=binary", "quant.calibrate=greedy", "adapter={method: alpha_tuning}")
    accepted("export.format=gguf")
    refused("changes asymmetric weights", "export.format=gguf", "quant.symmetric=false")
    refused(
        "one grid for all layers",
        "export.format=awq",
        "export.verify=false",
        "quant.overrides=[{match: '*.down_proj', group_size: 32}]",
    )
    accepted("export.format=compressed-tensors", "quant.bits=1", *alpha)
    accepted("export.format=gguf", "quant.bits=1", *alpha)
    refused("sign planes", "export.format=gguf", "quant.bits=2", *alpha)
    opt = checkpoint(
        tmp_path / "opt",
        transformers.OPTConfig(
            vocab_size=4096,
            hidden_size=256,
            num_hidden_layers=1,
            ffn_dim=256,
            num_attention_heads=4,
            word_embed_proj_dim=256,
            max_position_embeddings=512,
        ),
    )
    refused("gguf is written for llama, mistral", "export.format=gguf", f"model.path={opt.folder}")
    accepted("export.format=native", f"model.path={opt.folder}")
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    refused("export.verify: got true, and reading gptq needs gptqmodel, optimum", "export.format=gptq")
    accepted("export.format=gptq", "export.verify=false")
    tasks = ("eval.tasks=[recipes/assets/tasks/docstring_choice.yaml]", "export.verify=false")
    problems = problems_of(f"output={tmp_path / 'run'}", "export.format=gptq", *tasks)
    assert any("export.format gptq, whose reader needs gptqmodel, optimum" in text for text in problems)
    refused(
        "export.format: got 'gguf', which needs gguf, not installed here; run pip install 'lowbit-ft[gguf]'",
        "export.format=gguf",
        "export.verify=false",
    )


@pytest.mark.slow
def test_a_run_ends_in_a_gguf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ASSET.parents[2])
    out = tmp_path / "run"
    overrides = [
        *QUICK,
        "train.max_steps=1",
        "eval.perplexity=false",
        "eval.generate=[]",
        "export.format=gguf",
        f"output={out}",
    ]
    folder = pipeline.run(load_recipe(ASSET.parents[1] / "quickstart.yaml", overrides))
    said = capsys.readouterr().out
    assert (
        folder == out / "exported"
        and (folder / "model.gguf").is_file()
        and f"serve it: lowbit-ft serve {out}\n  or: llama-server -m {folder}/model.gguf" in said
    )
    assert (
        "logits: largest difference 0 (must be equal)" in said
        and "tokens: special tokens, stop tokens and chat template" in said
    )
    assert "gguf_file" in (folder / "README.md").read_text()
    manifest = check_files(folder)
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"format: gptq is verified through its reader, which needs gptqmodel, optimum"
    ):
        pipeline.export(out, "gptq")
    assert check_files(folder) == manifest
