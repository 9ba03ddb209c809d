"""Checkpoints that come in quantized: every layout code for code, refusals by name, and tuned ones out
again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.writer import write_model
from lowbit_ft.grid import PackedWeight
from lowbit_ft.incoming import READERS
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.load import Checkpoint, CheckpointError, load_model
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.incoming import resolve_quant
from lowbit_ft.recipe.sections.model import ModelSection
from lowbit_ft.recipe.sections.quant import QuantSection
from tests.architectures import CONFIGS, checkpoint_of
from tests.incoming_tools import PROJECTIONS, Layer, quantized_checkpoint
from tests.packed_tools import IDS, int_grid, packed_model, random_weights, tiny_checkpoint

CASES: list[tuple[str, dict[str, Any]]] = [
    *[
        ("gptq", {"bits": b, "symmetric": s, "settings": {"checkpoint_format": f}})
        for b in (2, 3, 4, 8)
        for s in (True, False)
        for f in ("gptq", "gptq_v2")
    ],
    ("gptq", {"group_size": -1}),
    ("awq", {"group_size": 128}),
    *[("compressed-tensors", {"bits": b, "symmetric": s}) for b in (2, 3, 4, 8) for s in (True, False)],
    ("compressed-tensors", {"group_size": -1}),
    ("compressed-tensors", {"scale_dtype": torch.bfloat16}),
    ("compressed-tensors", {"scale_dtype": torch.float32}),
]


def case_name(case: Any) -> str:
    return (
        "-".join([case[0], *(str(v).removeprefix("torch.") for v in case[1].values())])
        if isinstance(case, tuple)
        else str(case)
    )


def resolved(folder: Path, **given: Any) -> QuantSection:
    quant, problems = resolve_quant(ModelSection(path=str(folder)), QuantSection(**given))
    assert problems == []
    return quant


def packed(folder: Path, **given: Any) -> Any:
    return quantize(Checkpoint.open(folder, dtype="float32"), resolved(folder, **given))


def equal(weight: PackedWeight, layer: Layer) -> bool:
    zero = torch.full_like(layer.zero, weight.grid.levels // 2) if weight.zero is None else weight.zero
    return (
        torch.equal(weight.unpack_codes(), layer.codes)
        and torch.equal(weight.scale.float(), layer.scale.float())
        and torch.equal(zero, layer.zero)
    )


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_every_code_scale_and_zero_point_is_the_file_s(
    case: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    method, options = case
    layers = quantized_checkpoint(tmp_path / "q", method, **options)
    model, table = packed(tmp_path / "q")
    found = {name: m.base for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert found.keys() == layers.keys() and len(table.quantized) == len(layers) == 7
    for name, layer in layers.items():
        assert equal(found[name], layer), name
        assert found[name].residual is None
        assert torch.equal(found[name].dequantize(), layer.dense()), name
    # and as a whole: the logits of the dense model with these weights
    dense = load_model(Checkpoint.open(tmp_path / "q-dense", dtype="float32"))
    for name, layer in layers.items():
        dense.get_submodule(name).weight.data = layer.dense()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense(IDS).logits)


def test_a_dense_weight_is_there_where_one_is_asked_for(tmp_path: Path) -> None:
    """Evaluation walks a full-precision model one layer at a time: for such a checkpoint these are the
    dequantized weights.
    """
    layers = quantized_checkpoint(tmp_path / "q", "gptq")
    checkpoint = Checkpoint.open(tmp_path / "q", dtype="float32")
    name = next(iter(layers))
    assert f"{name}.weight" in checkpoint.names() and f"{name}.qweight" not in checkpoint.names()
    assert torch.equal(checkpoint.weight_for(f"{name}.weight"), layers[name].dense())
    with torch.no_grad():
        assert torch.equal(load_model(checkpoint)(IDS).logits, packed(tmp_path / "q")[0](IDS).logits)


def test_the_quant_section_is_the_checkpoint_s(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "q", "gptq", bits=3, group_size=32, symmetric=True)
    quant = resolved(tmp_path / "q")
    assert (quant.bits, quant.group_size, quant.symmetric, quant.residual_bits) == (3, 32, True, 0)
    assert (quant.calibrate, quant.scale_dtype, quant.targets, quant.exclude) == (
        "from_checkpoint",
        "float16",
        "all-linear",
        ["lm_head"],
    )
    again, problems = resolve_quant(
        ModelSection(path=str(tmp_path / "q")), QuantSection(**quant.model_dump())
    )
    assert again == quant and problems == []


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"bits": 3}, "quant.bits: got 3; q is GPTQ v1 with 4"),
        ({"group_size": 128}, "quant.group_size: got 128; q is GPTQ v1 with 64"),
        ({"symmetric": True}, "quant.symmetric: got true; q is GPTQ v1 with false"),
        (
            {"residual_bits": 4},
            "quant.residual_bits: got 4; q is GPTQ v1 with 0: the fraction that rounding threw away",
        ),
        ({"calibrate": "mse"}, "quant.calibrate: got 'mse'"),
        ({"grid": "binary"}, "quant.grid: got 'binary'"),
        ({"scale_dtype": "bfloat16"}, "quant.scale_dtype: got 'bfloat16'; q is GPTQ v1 with 'float16'"),
        ({"mse_p": 2.0}, "quant.mse_p: set, but q is quantized already"),
        ({"lm_head": 8}, "quant.lm_head: set, but q is quantized already"),
        ({"embeddings": 8}, "quant.embeddings: set, but q is quantized already"),
        ({"exclude": ["down_proj"]}, "quant.exclude: chooses other layers than are packed in q: "),
        (
            {"overrides": [{"match": "down_proj", "bits": 8}]},
            "quant.overrides: makes model.layers.0.mlp.down_proj 8 bit",
        ),
    ],
)
def test_a_quant_section_that_says_otherwise_is_an_error(
    given: dict[str, Any], key: str, tmp_path: Path
) -> None:
    quantized_checkpoint(tmp_path / "q", "gptq")
    problems = resolve_quant(ModelSection(path=str(tmp_path / "q")), QuantSection(**given))[1]
    assert [str(problem) for problem in problems if key in str(problem)], problems
    agreeing = {"bits": 4, "group_size": 64, "symmetric": False, "residual_bits": 0, "scale_dtype": "float32"}
    assert resolve_quant(ModelSection(path=str(tmp_path / "q")), QuantSection(**agreeing))[1] == []


def test_mixed_bits_become_overrides(tmp_path: Path) -> None:
    """Two config groups: by name before by class."""
    four = quantized_checkpoint(tmp_path / "q", "compressed-tensors", symmetric=True)
    eight = quantized_checkpoint(
        tmp_path / "q8",
        "compressed-tensors",
        symmetric=True,
        bits=8,
        group_size=32,
        source=tmp_path / "q-dense",
    )
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    other = json.loads((tmp_path / "q8" / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    groups["group_1"] = {**other, "targets": ["re:.*down_proj$"]}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("q", "q8"))
    save_file(
        a | {key: value for key, value in b.items() if "down_proj" in key},
        tmp_path / "q" / "model.safetensors",
    )
    quant = resolved(tmp_path / "q")
    assert [(o.match, o.bits, o.group_size) for o in quant.overrides] == [
        ("model.layers.0.mlp.down_proj", 8, 32)
    ]
    model, _ = packed(tmp_path / "q")
    for name in four:
        wanted = eight if name.endswith("down_proj") else four
        assert equal(model.get_submodule(name).base, wanted[name]), name


def test_zero_points_of_older_compressed_tensors(tmp_path: Path) -> None:
    """int8 [N, G], counted from the middle."""
    layers = quantized_checkpoint(tmp_path / "q", "compressed-tensors")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    for name, layer in layers.items():
        tensors[f"{name}.weight_zero_point"] = (
            (layer.zero.to(torch.int16) - 8).to(torch.int8).t().contiguous()
        )
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    model, _ = packed(tmp_path / "q")
    assert all(equal(model.get_submodule(name).base, layer) for name, layer in layers.items())


@pytest.mark.parametrize(
    "names",
    [
        (*PROJECTIONS, "lm_head"),
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj", "up_proj", "gate_proj", "down_proj"),
    ],
)
def test_the_layers_that_are_packed_are_the_ones_that_were(names: tuple[str, ...], tmp_path: Path) -> None:
    """A packed head, and checkpoints that leave some projections dense: the selection is read from the
    files.
    """
    layers = quantized_checkpoint(
        tmp_path / "q", "gptq", names=names, settings={"lm_head": "lm_head" in names}
    )
    quant = resolved(tmp_path / "q")
    assert quant.targets == sorted(names) and quant.exclude == []
    model, table = packed(tmp_path / "q")
    assert {row.layer for row in table.quantized} == set(layers)
    assert all(equal(model.get_submodule(name).base, layer) for name, layer in layers.items())
    with torch.no_grad():
        assert torch.equal(
            model(IDS).logits, load_model(Checkpoint.open(tmp_path / "q", dtype="float32"))(IDS).logits
        )


def test_a_section_that_chooses_dense_layers_is_refused_from_python_too(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "q", "gptq", names=("q_proj", "k_proj"))
    quant = resolved(tmp_path / "q").model_copy(update={"targets": ["q_proj", "k_proj", "v_proj"]})
    with pytest.raises(
        ValueError, match="v_proj are not packed there, but quant.targets and exclude choose them"
    ):
        quantize(Checkpoint.open(tmp_path / "q"), quant)


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


def test_symmetric_and_asymmetric_layers_in_one_checkpoint_are_refused(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "q", "compressed-tensors", symmetric=True)
    quantized_checkpoint(tmp_path / "a", "compressed-tensors", source=tmp_path / "q-dense")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    other = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    config["quantization_config"]["config_groups"]["group_1"] = {**other, "targets": ["re:.*down_proj$"]}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("q", "a"))
    save_file(
        a | {key: value for key, value in b.items() if "down_proj" in key},
        tmp_path / "q" / "model.safetensors",
    )
    (problem,) = resolve_quant(ModelSection(path=str(tmp_path / "q")), QuantSection())[1]
    assert str(problem).startswith(
        "model.path: got 'q', where some layers are symmetric and others (model.layers.0.mlp.down_proj, "
        "...) are not"
    )


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


def change(folder: Path, **settings: Any) -> None:
    """Change keys of quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(settings)
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, end: str, make: Any) -> str:
    """Replace the first tensor whose name ends so by make(tensor) (None: drop it)."""
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in sorted(tensors) if key.endswith(end))
    value = make(tensors.pop(name))
    save_file(tensors if value is None else tensors | {name: value}, folder / "model.safetensors")
    return name


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
        ("compressed-tensors", {"config_groups": None}, "config_groups: needs an object"),
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


def doubled(scale: torch.Tensor) -> torch.Tensor:
    out = scale.clone()
    out[0, 0] = -out[0, 0]
    return out


@pytest.mark.parametrize(
    ("end", "make", "message"),
    [
        (
            ".g_idx",
            lambda t: t.flip(0).contiguous(),
            r"layer model.*: g_idx puts 128 of 128 inputs into groups of non-neighbours \(desc_act",
        ),
        (".scales", doubled, "1 of 128 scales are below .* AutoRound"),
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
    with pytest.raises(ValueError, match=r"odd_proj are no linear of LlamaForCausalLM"):
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
    with pytest.raises(ValueError, match="bias is not zero, but this LlamaForCausalLM has no bias there"):
        packed(tmp_path / "q")


def test_a_section_that_was_not_resolved_is_refused(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "q", "gptq")
    with pytest.raises(
        ValueError,
        match="quant makes it W4 g128 sym with 4 residual bits, the GPTQ v1 checkpoint has it as W4 g64 asym",
    ):
        quantize(Checkpoint.open(tmp_path / "q"), QuantSection())
    with pytest.raises(ValueError, match="from_checkpoint, but .* is not quantized"):
        quantize(Checkpoint.open(tiny_checkpoint(tmp_path / "d")), QuantSection(calibrate="from_checkpoint"))
    problems = resolve_quant(
        ModelSection(path=str(tmp_path / "d")), QuantSection(calibrate="from_checkpoint")
    )[1]
    assert "is not quantized; remove the key" in str(problems[0])


@pytest.mark.parametrize(
    "name", [name for name, exporter in EXPORTERS.items() if exporter.quant_method in READERS]
)
def test_what_we_export_comes_in_again(name: str, tmp_path: Path) -> None:
    dense = Checkpoint.open(tiny_checkpoint(tmp_path / "dense"), dtype="float32")
    weights = random_weights(load_model(dense), int_grid(bits=4))
    write_model(tmp_path / "out", dense, weights, EXPORTERS[name])
    quant = resolved(tmp_path / "out")
    assert quant.scale_dtype == "bfloat16"  # bf16 values, whatever dtype the file has
    model, _ = quantize(Checkpoint.open(tmp_path / "out", dtype="float32"), quant)
    for layer, weight in weights.items():
        found = model.get_submodule(layer).base
        # AWQ has zero points always: all in the middle
        assert torch.equal(found.codes, weight.codes) and torch.equal(found.scale, weight.scale), layer  # pyright: ignore
        assert found.zero is None or bool((found.zero == 8).all())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, packed_model(dense, weights)(IDS).logits)


def test_what_compressed_tensors_itself_writes_comes_in(tmp_path: Path) -> None:
    """The library's own quantizer and compressor, asymmetric, fp32 scales."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path / "dense"), dtype=torch.float32)
    args = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=64)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        quantization_status="frozen",
        format="pack-quantized",
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.data.view(module.weight.shape[0], -1, 64)
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "theirs")
    compressor.update_config(tmp_path / "theirs")
    compressor.decompress_model(model)
    found, _ = packed(tmp_path / "theirs")
    layers = [name for name, m in found.named_modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 7
    for name in layers:
        torch.testing.assert_close(
            found.get_submodule(name).base.dequantize(), model.get_submodule(name).weight.data, rtol=0, atol=0
        )
