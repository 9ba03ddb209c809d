"""Checkpoints that come in quantized: every layout code for code, and tuned ones out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.writer import write_model
from lowbit_ft.incoming import READERS
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.load import load_model
from lowbit_ft.quantize.quantize import quantize
from tests.incoming.common import equal, packed, resolved
from tests.incoming_tools import quantized_checkpoint
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
    ("compressed-tensors", {"bits": 6, "symmetric": False}),
    ("compressed-tensors", {"scale_dtype": torch.bfloat16}),
    ("compressed-tensors", {"scale_dtype": torch.float32}),
]


def case_name(case: Any) -> str:
    return (
        "-".join([case[0], *(str(v).removeprefix("torch.") for v in case[1].values())])
        if isinstance(case, tuple)
        else str(case)
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


# What has quantized inputs is for a server; int-quantized is refused by its name (config_groups: format).
@pytest.mark.parametrize(
    "name",
    [n for n, exporter in EXPORTERS.items() if exporter.quant_method in READERS and n != "int-quantized"],
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
