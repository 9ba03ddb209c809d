"""The straight line over a checkpoint that came quantized: tuned, merged, exported; untouched layers keep the
very codes that came in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowbit_ft import pipeline
from lowbit_ft.integrations.adapter_files import read_adapter
from lowbit_ft.recipe.check import notes
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from tests.incoming_tools import ROOT, Layer, quantized_checkpoint

TINY = ROOT / "recipes" / "assets" / "tiny-llama"
HEAD = """
name: incoming
model: {path: MODEL, dtype: float32, device: cpu}
adapter: {method: dl_qat, rank: 4, targets: [q_proj, down_proj]}
data:
  train: {path: recipes/assets/docstrings/train.jsonl, format: chat, limit: 40}
  valid: {path: recipes/assets/docstrings/valid.jsonl, format: chat, limit: 8}
  sequence_len: 64
train: {max_steps: 2, micro_batch_size: 2, gradient_accumulation_steps: 1, learning_rate: 0.05}
eval: {windows: 2, window: 64}
output: OUT
"""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def write_recipe(folder: Path, model: Path, extra: str = "") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(HEAD.replace("MODEL", str(model)).replace("OUT", str(folder / "run")) + extra)
    return path


def codes_of_the_export(folder: Path, layer: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Through compressed-tensors' own unpacking."""
    words = load_file(folder / "model.safetensors")[f"{layer}.weight_packed"]
    return (unpack_from_int32(words, 4, torch.Size(shape)).to(torch.int16) + 8).to(torch.uint8)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_untouched_layers_ship_the_very_codes_that_came_in(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Must-show: W4 in, tuned, W4 compressed-tensors out."""
    layers = quantized_checkpoint(tmp_path / "came", method, source=TINY, group_size=128)
    recipe = load_recipe(write_recipe(tmp_path, tmp_path / "came"))
    assert (recipe.quant.calibrate, recipe.quant.scale_dtype, recipe.quant.residual_bits) == (
        "from_checkpoint",
        "float16",
        0,
    )
    folder = pipeline.run(recipe)
    assert "exported" == folder.name and "bit for bit" in capsys.readouterr().out
    out = load_file(folder / "model.safetensors")
    touched = codes = 0
    for name, layer in layers.items():
        same = torch.equal(codes_of_the_export(folder, name, tuple(layer.codes.shape)), layer.codes)
        scales = torch.equal(out[f"{name}.weight_scale"].t(), layer.scale.float())
        if name.endswith(("q_proj", "down_proj")):
            touched += not scales
            codes += not same
        else:
            assert same and scales, name
    assert touched == 8 and codes > 0, "training did nothing"
    rows = {
        row["stage"]: row["loss"]
        for row in json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    }
    assert rows["trained"] == rows["merged"] == rows["exported"] != rows["quantized"]
    # the reference is the checkpoint as it came: quantizing it did nothing
    assert rows["base"] == rows["quantized"]
    assert "as it came, quantized" in (tmp_path / "run" / "report.html").read_text()
    assert sorted(json.loads((folder / "lowbit_ft.json").read_text())["layers"]) == sorted(layers)
    # the adapter knows its layers, and the stages can be done again from the files
    assert len(read_adapter(tmp_path / "run" / "adapter")[0].targets or []) == 8
    pipeline.merge(tmp_path / "run")
    assert "written ones" in capsys.readouterr().out
    again = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert again.quant == recipe.quant


def test_what_was_tuned_can_come_in_again(tmp_path: Path) -> None:
    """Our own compressed-tensors export is a checkpoint to tune: bf16 scales that lie in fp32."""
    quantized_checkpoint(
        tmp_path / "came",
        "compressed-tensors",
        source=TINY,
        group_size=64,
        symmetric=True,
        scale_dtype=torch.bfloat16,
    )
    lines = ["model.dtype=bfloat16", "adapter={method: scale}", "eval.perplexity=false"]
    first = pipeline.run(load_recipe(write_recipe(tmp_path, tmp_path / "came"), lines))
    second = load_recipe(write_recipe(tmp_path, first), [*lines, f"output={tmp_path / 'second'}"])
    assert second.quant.scale_dtype == "bfloat16" and second.quant.symmetric
    pipeline.run(second)
    a, b = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "second" / "exported"))
    packed = [key for key in a if key.endswith("weight_packed")]
    assert len(packed) == 28 and all(torch.equal(a[key], b[key]) for key in packed)
    assert any(not torch.equal(a[key], b[key]) for key in a if key.endswith("weight_scale"))


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    return error.value.problems


def line_of(path: Path, key: str) -> int:
    return next(i for i, line in enumerate(path.read_text().splitlines(), 1) if key in line)


def test_a_recipe_that_disagrees_fails_with_its_line(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "came", "gptq", source=TINY, group_size=128)
    path = write_recipe(
        tmp_path, tmp_path / "came", "quant:\n  bits: 3\n  symmetric: true\n  residual_bits: 4\n"
    )
    told = problems_of(path)
    for key, wanted in (("bits: 3", "got 3"), ("symmetric: true", "got true"), ("residual_bits: 4", "got 4")):
        assert any(
            line.startswith(f"{path}:{line_of(path, key)}: quant.") and wanted in line for line in told
        ), told
    assert len(told) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "adapter={method: l4q, rank: 4}",
            "l4q needs the fraction that rounding threw away, .*; "
            "use lr_qat, dl_qat, lota, scale, full_qat, ef_qat, lora, or give",
        ),
        (
            "adapter={method: lr_qat, init: svd}",
            "adapter.init: svd reads the rounding error, .*; set adapter.init: zero",
        ),
        ("adapter={method: lr_qat, init: loftq}", "adapter.init: loftq reads the rounding error"),
        (
            "adapter.targets=[qproj]",
            "adapter.targets.0: got 'qproj', which matches no packed layer; did you mean 'q_proj'",
        ),
        (
            "model.dtype=bfloat16",
            "float16 scales do not survive bfloat16; set model.dtype: float32 \\(or float16\\), or "
            "export.format: native",
        ),
        ("adapter={method: alpha_tuning}", "works on quant.grid: binary"),
    ],
)
def test_methods_and_dtypes_that_cannot_are_refused_at_load(
    override: str, message: str, tmp_path: Path
) -> None:
    import re

    quantized_checkpoint(tmp_path / "came", "gptq", source=TINY, group_size=128)
    told = problems_of(write_recipe(tmp_path, tmp_path / "came"), override)
    assert re.search(message, "\n".join(told)), told


def lora_folder(folder: Path, source: Path = TINY, **options: Any) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, **options),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    model.save_pretrained(folder)
    return folder


def test_a_run_starts_from_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers: dict[str, Layer] = quantized_checkpoint(tmp_path / "came", "gptq", source=TINY, group_size=128)
    lora_folder(tmp_path / "lora", target_modules=["q_proj", "down_proj"])
    path = write_recipe(tmp_path, tmp_path / "came")
    recipe = load_recipe(
        path, ["adapter.init_from=lora", "train.learning_rate=1e-9", "eval.perplexity=false"]
    )  # beside the recipe
    assert recipe.adapter.init_from == str(tmp_path / "lora")
    assert any("without residual bits" in note for note in notes(recipe))
    assert any("was trained on" in note and "the same weights?" in note for note in notes(recipe))
    pipeline.train(recipe)
    assert "8 layers from the LoRA" in capsys.readouterr().out
    rows = json.loads((tmp_path / "run" / "lora_start.json").read_text())["rows"]
    assert len(rows) == 8 and all(row["error"] < 1e-6 for row in rows)
    config, state, _ = read_adapter(tmp_path / "run" / "adapter")
    theirs = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name in layers:
        if name.endswith("q_proj"):
            key = f"base_model.model.{name}"
            ours = config.gain * state[f"{key}.lowbit_adapters.B"] @ state[f"{key}.lowbit_adapters.A"]
            torch.testing.assert_close(
                ours,
                2 * theirs[f"{key}.lora_B.weight"] @ theirs[f"{key}.lora_A.weight"],
                rtol=1e-4,
                atol=1e-6,
            )


def test_a_lora_that_does_not_fit_fails_when_the_recipe_loads(tmp_path: Path) -> None:
    lora_folder(tmp_path / "lora", target_modules=["q_proj", "k_proj"])
    path = write_recipe(tmp_path, TINY)
    told = "\n".join(
        problems_of(path, f"adapter.init_from={tmp_path / 'lora'}", "adapter.rank=2", "adapter.init=svd")
    )
    assert "the LoRA has rank 4, adapter.rank is 2" in told
    assert "4 layers that get no adapter here, such as model.layers.0.self_attn.k_proj" in told
    assert "adapter.init: got 'svd' beside init_from" in told
    told = "\n".join(problems_of(path, f"adapter.init_from={tmp_path}"))
    assert "adapter_config.json: missing" in told
    assert "unknown key" in "\n".join(problems_of(path, "adapter={method: scale, init_from: x}"))


def test_act_order_is_refused_when_the_recipe_loads(tmp_path: Path) -> None:
    layers = quantized_checkpoint(
        tmp_path / "came", "gptq", source=TINY, settings={"desc_act": True}, group_size=128
    )
    assert (
        load_recipe(write_recipe(tmp_path, tmp_path / "came")).quant.bits == 4
    )  # sorted nothing: the plain order
    tensors = load_file(tmp_path / "came" / "model.safetensors")
    name = list(layers)[5]
    tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"].flip(0).contiguous()
    save_file(tensors, tmp_path / "came" / "model.safetensors")
    told = problems_of(write_recipe(tmp_path, tmp_path / "came"))
    assert any(name in line and "desc_act" in line and "model.path" in line for line in told), told


def test_init_writes_a_recipe_that_loads(tmp_path: Path) -> None:
    from lowbit_ft.cli.init import write_recipe as init

    quantized_checkpoint(tmp_path / "came", "awq", source=TINY, group_size=128)
    init(str(tmp_path / "came"), tmp_path / "made.yaml")
    text = (tmp_path / "made.yaml").read_text()
    assert "(AWQ GEMM)" in text and "28 layers are packed already" in text and "residual_bits" not in text
    recipe = load_recipe(
        tmp_path / "made.yaml",
        [f"data.train.path={ROOT}/recipes/assets/docstrings/train.jsonl", "model.dtype=float32"],
    )
    assert recipe.adapter.method == "dl_qat" and recipe.quant.group_size == 128


def test_an_adapter_on_some_layers_loads_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    import lowbit_ft  # noqa: F401 - the native format
    from lowbit_ft.integrations.peft import LowBitConfig
    from lowbit_ft.integrations.peft_layer import LowBitLinear

    quantized_checkpoint(tmp_path / "came", "gptq", source=TINY, group_size=128)
    pipeline.train(load_recipe(write_recipe(tmp_path, tmp_path / "came"), ["eval.perplexity=false"]))
    ids = torch.arange(3, 40)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    assert sum(isinstance(module, LowBitLinear) for module in model.modules()) == 8
    with torch.no_grad():
        assert torch.equal(model(ids).logits, merged(ids).logits)
    for key in ({"targets": ["q_proj"]}, {"init_from": "somewhere"}):
        with pytest.raises(ValueError, match="is a key of recipes; PEFT's own are target_modules"):
            LowBitConfig(method="lr_qat", options=key)


def test_a_hub_checkpoint_says_its_grid_once_it_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is fetched nothing is known of it; then the recipe of the run has its grid, or the run stops
    before it begins.
    """
    from huggingface_hub import constants

    from lowbit_ft import session
    from lowbit_ft.model import checkpoint

    commit = "0" * 40
    cache = tmp_path / "cache" / "models--org--tiny"

    def fetch(source: str, revision: str | None) -> tuple[Path, str | None]:
        assert source == "org/tiny"
        if not cache.exists():
            (cache / "snapshots").mkdir(parents=True)
            (cache / "refs").mkdir()
            (cache / "refs" / "main").write_text(commit)
            quantized_checkpoint(cache / "snapshots" / commit, "awq", source=TINY, group_size=64)
        return cache / "snapshots" / commit, commit

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "locate", fetch)
    recipe = load_recipe(write_recipe(tmp_path, Path("org/tiny")))
    assert recipe.quant.calibrate == "gptq" and recipe.quant.group_size == 128
    begun = session.start(recipe)
    quant = begun.recipe.quant
    assert (quant.calibrate, quant.group_size, quant.symmetric, quant.residual_bits) == (
        "from_checkpoint",
        64,
        False,
        0,
    )
    assert begun.run.recipe().quant == quant and begun.checkpoint.revision == commit
    wrong = recipe.model_copy(update={"quant": type(quant)(bits=3), "output": tmp_path / "other"})
    with pytest.raises(RecipeError, match="quant.bits: got 3; tiny is AWQ GEMM with 4; remove the key"):
        session.start(wrong)
    assert not (tmp_path / "other").exists()
