"""Zeros of a model that is packed: chosen, locked before rounding, in every calibrator's result."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowbit_ft.adapters.attach import packed_layers
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.quantize.direct import Direct, pack_folder
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.quantize.while_loading import LowBitQuantConfig
from lowbit_ft.recipe.incoming import resolve_quant
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.sparsity import PATTERNS
from tests.incoming_tools import quantized_checkpoint
from tests.packed_tools import tiny_checkpoint

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
LAYERS = 7


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("dense"), **SMALL)


@pytest.fixture(scope="module")
def sparse(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, nine of ten weights of its linears at zero, and some of the rest too small for the grid."""
    folder = tmp_path_factory.mktemp("sparse")
    for file in dense.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if weight.dim() == 2 and "_proj" in name:
            weight[torch.rand(weight.shape) < 0.9] = 0
            weight[torch.rand(weight.shape) < 0.1] *= 2.0**-20
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def tokens() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 64, (4, 24), generator=generator)} for _ in range(3)]


def packed(folder: Path, kind: str, calibrate: str, pattern: str = "unstructured", **more: Any) -> Any:
    quant = QuantSection.model_validate(
        {
            "bits": 4,
            "group_size": 32,
            "calibrate": calibrate,
            "sparsity": {"kind": kind, "pattern": pattern},
            "calibration": {"steps": 3, **more},
        }
    )
    return quantize(Checkpoint.open(folder), quant, calibration=tokens)


@pytest.mark.parametrize("calibrate", ["mse", "gptq", "signround"])
def test_the_zeros_of_the_checkpoint_are_locked_and_no_others(sparse: Path, calibrate: str) -> None:
    model, table = packed(sparse, "locked", calibrate)
    files, free = load_file(sparse / "model.safetensors"), 0
    for name, layer in packed_layers(model):
        zeros = files[f"{name}.weight"] == 0
        assert torch.equal(layer.base.locked, zeros) and layer.base.grid.mask
        free += int((layer.base.dequantize()[~zeros] == 0).sum())
    assert free > 0, "small weights round to zero, and are not locked"
    assert table.zeros == pytest.approx(0.9, abs=0.02) and "zero, and locked: " in str(table)
    assert len(table.quantized) == LAYERS and all(row.zeros for row in table.quantized)


@pytest.mark.parametrize(
    ("kind", "calibrate", "pattern"),
    [
        ("magnitude", "signround", "2:4"),
        ("wanda", "mse", "1x4"),
        ("wanda", "gptq", "2:4"),
        ("sparsegpt", "mse", "2:4"),
        ("sparsegpt", "gptq", "1x4"),
    ],
)
def test_pruned_once_and_locked(dense: Path, kind: str, calibrate: str, pattern: str) -> None:
    model, table = packed(dense, kind, calibrate, pattern)
    for name, layer in packed_layers(model):
        zeros = layer.base.locked
        assert zeros.float().mean() == pytest.approx(0.5, abs=0.01) and PATTERNS[pattern].holds(zeros), name
        assert not layer.base.dequantize()[zeros].any()
        if kind == "wanda" and pattern == "2:4":
            assert (zeros.sum(1) == zeros.shape[1] // 2).all(), "of each row as many"
    assert table.zeros == pytest.approx(0.5, abs=0.01)


def test_a_compensating_start_loses_less(dense: Path) -> None:
    """By the error of the packed model's own logits: sparsegpt makes up for its zeros, magnitude does not;
    gptq makes up for those of either."""
    ids = tokens()[0]["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    with torch.no_grad():
        want = model(ids).logits
        off = {
            (kind, calibrate): float((packed(dense, kind, calibrate)[0](ids).logits - want).square().mean())
            for kind in ("magnitude", "sparsegpt")
            for calibrate in ("mse", "gptq")
        }
    assert (
        off["sparsegpt", "mse"] < off["magnitude", "mse"]
        and off["magnitude", "gptq"] < off["magnitude", "mse"]
    )
    assert off["sparsegpt", "gptq"] < off["magnitude", "gptq"]


def test_what_cannot_be_is_refused_by_name(dense: Path, sparse: Path) -> None:
    with pytest.raises(ValueError, match=r"kind: locked, but no weight of .* is zero; set kind: magnitude"):
        packed(dense, "locked", "mse")
    with pytest.raises(ValueError, match=r"proj: its zeros \(.* do not lie as quant.sparsity.pattern: 1x4"):
        packed(sparse, "locked", "mse", "1x4")
    with pytest.raises(ValueError, match="kind: wanda looks at rows, and none are given"):
        Direct.of({"sparsity": {"kind": "wanda"}, "calibrate": "mse"})
    with pytest.raises(ValueError, match="has no zero: its levels are sums"):
        Direct.of({"grid": "binary", "bits": 3, "sparsity": {"kind": "locked"}})


def test_a_packed_folder_keeps_its_mask_under_peft(sparse: Path, tmp_path: Path) -> None:
    """`quantize MODEL`, `from_pretrained` of that folder and of the dense one, a PEFT adapter, its merge."""
    import peft  # slow

    keys = {"bits": 4, "group_size": 32, "calibrate": "mse", "sparsity": {"kind": "locked"}}
    pack_folder(str(sparse), Direct.of(keys), tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(
        sparse, quantization_config=LowBitQuantConfig(**keys), dtype=torch.float32
    )
    bases = {name: layer.base for name, layer in packed_layers(model)}
    assert len(bases) == LAYERS
    assert {n: layer.base.digest() for n, layer in packed_layers(again)} == {
        n: b.digest() for n, b in bases.items()
    }
    with pytest.raises(ValueError, match="use lr_qat, dl_qat or l4q, whose update is masked"):
        peft.get_peft_model(again, LowBitConfig(method="lora"))
    tuned = peft.get_peft_model(
        model, LowBitConfig(method="lr_qat", rank=4, target_modules=["q_proj", "up_proj"])
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith("lora_B") or name.rpartition(".")[2] == "B":
                parameter.normal_(0, 3)
    want = tuned(tokens()[0]["input_ids"]).logits
    merged = tuned.merge_and_unload()
    assert torch.equal(merged(tokens()[0]["input_ids"]).logits, want)
    moved = 0
    for name, layer in packed_layers(merged):
        assert "mask" not in dict(layer.named_buffers()) and not layer.grid.mask
        assert not layer.base.dequantize()[bases[name].locked].any()
        moved += int((layer.base.unpack_codes() != bases[name].unpack_codes()).sum())
    assert moved > 0
    assert (
        replace(next(iter(bases.values())).grid, mask=False).deployed == next(packed_layers(merged))[1].grid
    )


def test_codes_at_the_zero_point_of_a_checkpoint_that_came_quantized(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gptq"
    quantized_checkpoint(folder, "gptq", source=dense, bits=2, group_size=32)
    checkpoint = Checkpoint.open(folder)
    section = QuantSection.model_validate({"sparsity": {"kind": "locked"}})
    quant, problems = resolve_quant(SimpleNamespace(path=str(folder), revision=None), section)
    assert not problems
    model, table = quantize(checkpoint, quant)
    for name, layer in packed_layers(model):
        assert torch.equal(layer.base.locked, layer.base.dequantize() == 0), name
    assert table.zeros is not None and 0.1 < table.zeros < 0.9
