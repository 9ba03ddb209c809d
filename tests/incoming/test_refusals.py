"""What no grid can hold, and files that are not what their settings say: refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit_ft.files.tensorfile import CheckpointError
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from tests.architectures import CONFIGS, checkpoint_of
from tests.incoming.common import change, packed, resolved, rewrite
from tests.incoming_tools import quantized_checkpoint


def test_outputs_that_do_not_fill_a_word_are_not_guessed(tmp_path: Path) -> None:
    """12 outputs have 48 bits of zero points: a word and a half, which a file must hold as two."""
    quantized_checkpoint(tmp_path / "q", "gptq")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.qweight"] = tensors[f"{name}.qweight"][:, :12].contiguous()
    tensors[f"{name}.scales"] = tensors[f"{name}.scales"][:, :12].contiguous()
    tensors[f"{name}.qzeros"] = tensors[f"{name}.qzeros"][:, :1].contiguous()
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"up_proj.qzeros is int32 \[2, 1\]; quantization_config makes it int32 \[2, 2\]",
    ):
        Checkpoint.open(tmp_path / "q")


def test_experts_that_are_packed_one_by_one_are_refused_by_name(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "q", "gptq")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    save_file(
        {key.replace("mlp.", "mlp.experts.3."): value for key, value in tensors.items()},
        tmp_path / "q" / "model.safetensors",
    )
    with pytest.raises(
        CheckpointError,
        match=r"packed one by one \(model.layers.0.mlp.experts.3.down_proj, ...\).*full-precision",
    ):
        Checkpoint.open(tmp_path / "q")


def test_a_packed_conv1d_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint_of(CONFIGS["gpt2"](), tmp_path / "dense")
    quantized_checkpoint(
        tmp_path / "q", "gptq", source=tmp_path / "dense", group_size=32, names=("c_attn", "c_fc", "c_proj")
    )
    section = QuantSection(
        group_size=32, symmetric=False, residual_bits=0, scale_dtype="float16", calibrate="from_checkpoint"
    )
    with pytest.raises(
        ValueError, match=r"h\.0\.attn\.c_attn.* are packed there, but are no plain linears \(a Conv1D"
    ):
        quantize(Checkpoint.open(tmp_path / "q", dtype="float32"), section)


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}


def group(**changes: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS} | changes}}


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "gptq",
            {"quant_method": "hqq"},
            "already quantized by 'hqq'; allowed: gptq, awq, compressed-tensors",
        ),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format: got 'marlin'; allowed: gptq, gptq_v2"),
        ("gptq", {"bits": 5}, "GPTQ checkpoint: bits: got 5; allowed are 2, 3, 4, 8"),
        ("gptq", {"bits": 6}, "GPTQ checkpoint: bits: got 6; allowed are 2, 3, 4, 8"),
        ("gptq", {"group_size": 16}, "group_size: got 16; allowed are 32"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype: got 'int16'"),
        ("gptq", {"dynamic": {"+:.*down_proj": {"bits": 8}}}, r"dynamic: got the rule '\+:\.\*down_proj'"),
        (
            "gptq",
            {"bits": 8},
            r"down_proj.qzeros is int32 \[4, 16\]; quantization_config makes it int32 \[2, 32\]",
        ),
        ("awq", {"version": "gemv"}, "version: got 'gemv'.*allowed: gemm"),
        ("awq", {"bits": 8}, "bits: got 8; allowed: 4"),
        ("awq", {"zero_point": False}, "zero_point: got False"),
        ("compressed-tensors", {"format": "marlin-24"}, "format: got 'marlin-24'; allowed: pack-quantized"),
        ("compressed-tensors", group(input_activations={"num_bits": 8}), "input_activations: got a scheme"),
        (
            "compressed-tensors",
            group(weights=WEIGHTS | {"type": "float"}),
            "weights.type: got 'float'; allowed: int",
        ),
        ("compressed-tensors", group(weights=WEIGHTS | {"num_bits": 5}), "bits: got 5"),
        (
            "compressed-tensors",
            group(weights=WEIGHTS | {"actorder": "group"}),
            "actorder 'group', .* no weight_g_idx",
        ),
        ("compressed-tensors", group(targets=["re:["]), "no regular expression"),
        ("compressed-tensors", group(targets=["Conv2d"]), "no group of config_groups has it"),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: got a scheme"),
        ("gptq", {"bits": 4.0}, "quantization_config: bits: got 4.0; allowed: an integer"),
        ("gptq", {"sym": "x"}, "quantization_config: sym: got 'x'; allowed: true or false"),
        ("awq", {"group_size": [64]}, "group_size: got a JSON list; allowed: an integer"),
        ("compressed-tensors", group(targets=5), "config_groups.group_0.targets: got 5; allowed: a list"),
        ("compressed-tensors", group(targets=["re:(?R)*"]), "takes more than .* seconds"),
        ("compressed-tensors", group(targets=["re:(.*)*(.*)*X"]), "no group of config_groups has it"),
        ("compressed-tensors", {"config_groups": None}, "config_groups: got None; allowed: an object"),
        (
            "compressed-tensors",
            {"sparsity_config": {"format": "sparse-24"}},
            "sparsity_config.format: got 'sparse-24'",
        ),
    ],
)
def test_settings_no_grid_can_hold_are_refused(
    method: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    quantized_checkpoint(tmp_path / "q", method)
    change(tmp_path / "q", **settings)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path / "q")


def test_a_shape_that_is_no_pair_is_refused(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "q", "compressed-tensors")
    rewrite(tmp_path / "q", ".weight_shape", lambda t: t[0].clone())
    with pytest.raises(CheckpointError, match=r"weight_shape is int64 \[\]; needs two integers"):
        Checkpoint.open(tmp_path / "q")


def emptied(scale: torch.Tensor) -> torch.Tensor:
    out = scale.clone()
    out[0, 0] = 0
    return out


@pytest.mark.parametrize(
    ("end", "make", "message"),
    [
        (
            ".g_idx",
            lambda t: t.flip(0).contiguous(),
            r"layer model.*: g_idx puts 128 of 128 inputs into groups of non-neighbours \(desc_act",
        ),
        (".scales", emptied, "1 of 128 scales are nearer to 0 than .* groups without weights"),
        (".scales", lambda t: t * float("nan"), "scales have NaN or Inf"),
        (
            ".qzeros",
            lambda t: t | 15,
            "zero points are stored as 15, which the readers of GPTQ v1 do not agree on",
        ),
    ],
)
def test_tensors_that_would_have_to_be_changed_are_refused(
    end: str, make: Any, message: str, tmp_path: Path
) -> None:
    quantized_checkpoint(tmp_path / "q", "gptq")
    name = rewrite(tmp_path / "q", f"k_proj{end}", make)
    quant = resolved(tmp_path / "q")
    with pytest.raises(ValueError, match=message) as error:
        quantize(Checkpoint.open(tmp_path / "q"), quant)
    assert name.removesuffix(end) in str(error.value)


def test_symmetric_files_with_other_zero_points_and_scales_that_are_not_what_the_first_layer_said(
    tmp_path: Path,
) -> None:
    quantized_checkpoint(tmp_path / "q", "gptq", symmetric=False)
    change(tmp_path / "q", sym=True)
    with pytest.raises(
        ValueError, match=r"settings say symmetric, but .* zero points are not 8.*set sym .* to false"
    ):
        packed(tmp_path / "q")
    layers = quantized_checkpoint(tmp_path / "r", "compressed-tensors", scale_dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "r" / "model.safetensors")
    last = list(layers)[-1]
    for name in layers:
        scale = tensors[f"{name}.weight_scale"].float()
        tensors[f"{name}.weight_scale"] = scale if name != last else scale + 1e-6
    save_file(tensors, tmp_path / "r" / "model.safetensors")
    with pytest.raises(
        ValueError, match=f"{last}: .* are not bfloat16 values.*set quant.scale_dtype: float32"
    ):
        packed(tmp_path / "r")
    model, _ = packed(tmp_path / "r", scale_dtype="float32")
    assert torch.equal(model.get_submodule(last).base.scale.t(), tensors[f"{last}.weight_scale"])


def test_missing_tensors_and_layers_the_model_has_not(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "q", "gptq")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    name = rewrite(tmp_path / "q", "k_proj.qzeros", lambda t: None)
    with pytest.raises(CheckpointError, match=f"no tensor {name} in the files"):
        Checkpoint.open(tmp_path / "q")
    extra = {
        key.replace("k_proj", "odd_proj"): value.clone() for key, value in tensors.items() if "k_proj" in key
    }
    save_file(tensors | extra, tmp_path / "q" / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensor that a LlamaForCausalLM .*does not take: .*odd_proj"):
        packed(
            tmp_path / "q",
            targets=["q_proj", "k_proj", "v_proj", "o_proj", "odd_proj", "gate_proj", "up_proj", "down_proj"],
            exclude=[],
        )
    dense = {key: value for key, value in tensors.items() if "proj" not in key}
    save_file(dense, tmp_path / "q" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"says gptq, but no tensor is called \*\.qweight"):
        Checkpoint.open(tmp_path / "q")


def test_a_bias_the_model_has_not_must_be_zero(tmp_path: Path) -> None:
    """AutoGPTQ wrote zero biases beside every layer."""
    layers = quantized_checkpoint(tmp_path / "q", "gptq")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    zeros = {
        f"{name}.bias": torch.zeros(len(layer.codes), dtype=torch.float16) for name, layer in layers.items()
    }
    save_file(tensors | zeros, tmp_path / "q" / "model.safetensors")
    assert len(packed(tmp_path / "q")[1].quantized) == 7
    zeros[f"{list(layers)[2]}.bias"] += 1
    save_file(tensors | zeros, tmp_path / "q" / "model.safetensors")
    with pytest.raises(ValueError, match=r"a LlamaForCausalLM .*does not take: .*proj\.bias"):
        packed(tmp_path / "q")
