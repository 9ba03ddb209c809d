"""Quantized inputs in files: what the library under transformers makes of them, and who refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compressed_tensors.quantization.utils.helpers as library
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoModelForCausalLM

from lowbit_ft.activations import Scheme
from lowbit_ft.activations.base import BITS
from lowbit_ft.activations.place import activations_off, hosts, place_activations
from lowbit_ft.export import EXPORTERS, LayerSpec
from lowbit_ft.export.compressed_tensors import input_arguments, scheme_of_arguments
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.verify import verify
from lowbit_ft.export.verify_logits import INPUT_TOLERANCE
from lowbit_ft.export.writer import check_model, write_model
from lowbit_ft.merge import merged_weights
from lowbit_ft.model.linear import packed_op_only
from tests.export.common import checkpoint
from tests.packed_tools import IDS, int_grid, packed_model, random_weights

TOKEN = Scheme(kind="token", bits=8)
# (format, grid, scheme): what servers are offered
SHIPPED: list[tuple[str, dict[str, Any], Scheme]] = [
    ("compressed-tensors", {"bits": 4, "group_size": 32}, TOKEN),
    ("compressed-tensors", {"bits": 3}, Scheme(kind="token", bits=4)),
    ("compressed-tensors", {"bits": 2, "group_size": 32}, Scheme(kind="group", bits=8, group_size=32)),
    ("compressed-tensors", {"bits": 8, "group_size": -1}, TOKEN),
    ("compressed-tensors", {"bits": 4, "symmetric": False}, TOKEN),
    ("int-quantized", {"bits": 8, "group_size": -1}, TOKEN),
    ("int-quantized", {"bits": 8, "group_size": -1}, Scheme(kind="token", bits=8, symmetric=False)),
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad(), packed_op_only(model):
        return model.eval()(IDS).logits


def by_our_rule(lowest: Any, highest: Any, args: Any, global_scale: Any = None) -> Any:
    """The library's scales with absmax / (2^(b-1) - 1) in the place of absmax / ((2^b - 1) / 2)."""
    scale, zero = LIBRARY(lowest, highest, args, global_scale=global_scale)
    if args.symmetric and args.dynamic:
        scale = torch.maximum(highest, -lowest) / (2 ** (args.num_bits - 1) - 1)
    return scale, zero


LIBRARY = library.calculate_qparams


@pytest.mark.parametrize(("format", "grid", "scheme"), SHIPPED, ids=lambda v: str(v))
def test_readers_compute_the_training_forward(
    format: str, grid: dict[str, Any], scheme: Scheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "c", hidden_size=128)
    model = packed_model(source, random_weights(source.empty_model(), int_grid(**grid)))
    place_activations(model, {name: scheme for name, _ in hosts(model)})
    wanted = logits(model)
    with activations_off(model):
        weights_only = logits(model)
    effect = float((wanted - weights_only).abs().mean())
    assert effect > 1e-4
    manifest = write_model(tmp_path / "m", source, merged_weights(model), EXPORTERS[format])
    assert manifest["format"] == format
    assert verify(tmp_path / "m", merged_weights(model), model=model, source=source.folder).ok

    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    layout = "int-quantized" if format == "int-quantized" else "pack-quantized"
    assert config["format"] == group["format"] == layout, "by name: the library would infer int-quantized"
    read = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "dequantize"})
    inputs: Any = read.config_groups["group_0"].input_activations  # pyright: ignore[reportAttributeAccessIssue]
    assert scheme_of_arguments(inputs.model_dump()) == scheme, "the library says the same of it"

    ours = load_exported(tmp_path / "m")
    assert torch.equal(logits(ours), wanted), "bit for bit by vLLM's rule"
    if not grid.get("symmetric", True):
        return  # its own reader needs dequantize=True there, which leaves the inputs alone
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    found = logits(theirs)
    if scheme.symmetric:
        assert not torch.equal(found, wanted), "the library's own scale is absmax / 127.5"
        monkeypatch.setattr(library, "calculate_qparams", by_our_rule)
        found = logits(theirs)
    if scheme.bits == 8:  # at 4 bits one tie that falls otherwise is a seventh of the largest input
        # By position: a tie that falls otherwise (seen: one row's in one position, and what attends to it)
        # moves some positions by more than a mean over all of them tells.
        apart = (found - wanted).abs().mean(-1).flatten()
        assert float((apart < 1e-3 * effect).float().mean()) > 0.8, "everything else is equal"
        assert float(apart.max()) < effect


@pytest.mark.parametrize("bits", (3, 6))
def test_widths_that_only_our_own_format_and_onnx_carry(bits: int, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", hidden_size=128)
    model = packed_model(source, random_weights(source.empty_model(), int_grid(bits=bits)))
    place_activations(model, {name: Scheme(kind="token", bits=bits) for name, _ in hosts(model)})
    weights = merged_weights(model)
    write_model(tmp_path / "m", source, weights, EXPORTERS["native"])
    assert verify(tmp_path / "m", weights, model=model, source=source.folder).ok
    assert torch.equal(logits(load_exported(tmp_path / "m")), logits(model))
    assert set(INPUT_TOLERANCE) == set(BITS)


def test_arguments_come_back_and_others_are_refused() -> None:
    for scheme in {scheme for _, _, scheme in SHIPPED}:
        assert scheme_of_arguments(input_arguments(scheme)) == scheme
    for change in ({"dynamic": False}, {"type": "float"}, {"strategy": "tensor"}, {"num_bits": 5}):
        with pytest.raises(ValueError):
            scheme_of_arguments(input_arguments(TOKEN) | change)


REFUSED: list[tuple[str, Scheme, str]] = [
    *((name, TOKEN, "holds weights only") for name in ("gguf", "gptq", "gptq_v2", "awq", "mlx", "torchao")),
    ("compressed-tensors", Scheme(kind="tensor", bits=8, dynamic=False, scale=(1.0,)), "set dynamic: true"),
    ("compressed-tensors", Scheme(kind="tensor", bits=8), "not kind tensor"),
    ("compressed-tensors", Scheme(kind="dual", bits=8), "not kind dual"),
    ("compressed-tensors", Scheme(kind="token", bits=8, symmetric=False), "set symmetric: true"),
    ("compressed-tensors", Scheme(kind="token", bits=8, clip=0.9), "set clip: 1.0"),
    ("compressed-tensors", Scheme(kind="group", bits=8, group_size=96), "does not divide 128 inputs"),
    ("compressed-tensors", Scheme(kind="token", bits=6), "set activations.bits: 8 or 4"),
    ("int-quantized", Scheme(kind="token", bits=4), "8 bits per token"),
    ("int-quantized", Scheme(kind="token", bits=6), "8 bits per token"),
]


def test_who_cannot_carry_a_scheme_says_so_with_the_way_out(tmp_path: Path) -> None:
    assert {name for name, *_ in REFUSED} == EXPORTERS.keys() - {"native", "onnx"}  # these carry all
    grid = int_grid(bits=8, group_size=-1)
    for name, scheme, words in REFUSED:
        reason = EXPORTERS[name].reject_activation(scheme, grid, 128)
        assert reason is not None and words in reason and "native" in reason, (name, reason)
        problems = EXPORTERS[name].reject_model({"m.0.x": LayerSpec((32, 128), grid, activation=scheme)})
        assert any(reason in problem for problem in problems) or EXPORTERS[name].reject(grid)
        assert EXPORTERS["native"].reject_activation(scheme, grid, 128) is None
    source = checkpoint(tmp_path / "c", vocab_size=64, hidden_size=128)
    model = packed_model(source, random_weights(source.empty_model(), int_grid()))
    place_activations(model, {name: TOKEN for name, _ in hosts(model)})
    with pytest.raises(ValueError, match="mlx holds weights only"):
        check_model(source, merged_weights(model).specs, EXPORTERS["mlx"])
