"""Tensors in the files that the model does not take: harmless, or named before anything is quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft import pipeline
from lowbit_ft.files.tensorfile import CheckpointError
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from tests.checkpoint_tools import MODELS, edit, random_checkpoint

QUICK = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")


def to_fp8(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[name + "_scale"] = scale.reshape(1)


def to_int8(tensors: dict[str, Any]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)


def biases(tensors: dict[str, Any]) -> None:
    for layer in range(2):
        for part in "qkv":
            key = f"model.layers.{layer}.self_attn.{part}_proj"
            tensors[f"{key}.bias"] = torch.ones(tensors[f"{key}.weight"].shape[0])


STRANGE = {
    "fp8 beside its scales": (
        to_fp8,
        r"14 tensors that a LlamaForCausalLM .*: model\.layers\.\*\.mlp\.down_proj\.weight_scale, "
        r".*no quantization_config.*give the full-precision checkpoint",
    ),
    "integers as weights": (to_int8, r"'model\.layers\.0\.mlp\.up_proj\.weight' holds int8 integers"),
    "biases": (
        biases,
        r"6 tensors .*: model\.layers\.\*\.self_attn\.k_proj\.bias, .*q_proj\.bias, .*v_proj\.bias "
        r"\(the first is 'model\.layers\.0\.self_attn\.k_proj\.bias' in model\.safetensors\): .*do not",
    ),
    "a layer more": (
        lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(32)}),
        r"1 tensor .*: model\.layers\.\*\.input_layernorm\.weight",
    ),
    "another head": (lambda t: t.update({"score.weight": torch.ones(2, 32)}), r"score\.weight"),
}


@pytest.mark.parametrize("case", list(STRANGE))
def test_tensors_that_would_be_lost_are_named(case: str, llama: Path) -> None:
    change, message = STRANGE[case]
    edit(llama, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(llama).refuse_strangers()
    with pytest.raises(RecipeError, match=rf"model\.path: got .*{message}"):
        load_recipe(QUICK, [f"model.path={llama}"])


HARMLESS = {
    "rotary tables": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "positions": {"model.embeddings.position_ids": torch.arange(8)[None]},
    "a causal mask": {"model.layers.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)},
    "biases of zero": {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
}


@pytest.mark.parametrize("case", list(HARMLESS))
def test_what_changes_nothing_is_left_out(case: str, llama: Path) -> None:
    ids = torch.arange(3, 20)[None]
    before = load_model(Checkpoint.open(llama))(ids).logits
    edit(llama, lambda tensors: tensors.update(HARMLESS[case]))
    assert torch.equal(load_model(Checkpoint.open(llama))(ids).logits, before)


def test_what_transformers_leaves_out_for_a_model_is_left_out(tmp_path: Path) -> None:
    """Draft layers of some models (mtp.*) are a table of transformers' classes."""
    folder = random_checkpoint(tmp_path / "m", MODELS["llama"]())
    edit(folder, lambda tensors: tensors.update({"mtp.norm.weight": torch.ones(3)}))
    checkpoint = Checkpoint.open(folder)
    kind = type(Checkpoint.open(random_checkpoint(tmp_path / "n", MODELS["llama"]())).empty_model())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
        checkpoint.refuse_strangers()
    with pytest.raises(CheckpointError, match=r"mtp\.norm\.weight"):
        Checkpoint.open(folder).refuse_strangers()


def test_a_pad_token_without_a_row_is_no_assertion(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"pad_token_id": 99}))
    with pytest.raises(CheckpointError, match="no model can be built.*[Pp]adding_idx"):
        Checkpoint.open(llama).refuse_strangers()


def test_a_run_names_them_before_it_quantizes(llama: Path, tmp_path: Path) -> None:
    """Also where the recipe was read before the files changed."""
    tiny = Path(QUICK).parent / "assets" / "tiny-llama"
    out = tmp_path / "run"
    recipe = load_recipe(QUICK, [f"output={out}", "model.device=cpu"])
    for file in tiny.iterdir():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    edit(tmp_path / "model", to_fp8)
    model = recipe.model.model_copy(update={"path": str(tmp_path / "model")})
    with pytest.raises(CheckpointError, match=r"weight_scale"):
        pipeline.quantize(recipe.model_copy(update={"model": model}))
    assert not (out / "base").exists()
