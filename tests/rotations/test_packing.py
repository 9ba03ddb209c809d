"""A folded checkpoint where it is packed, fitted and written: one basis everywhere, and r4's op with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, packed_layers
from lowbit_ft.adapters.lora_start import read_lora, start_from_lora
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.writer import write_model
from lowbit_ft.grid import IntGrid
from lowbit_ft.merge import merged_weights
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from lowbit_ft.model.unrounded import unrounded
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.reconstruct import ReconstructSection
from lowbit_ft.rotations import FoldedCheckpoint, OnlineHadamard, Rotation
from lowbit_ft.train.reconstruct import reconstruct
from tests.adapters.test_lora_start import make_lora, product
from tests.checkpoint_tools import TINY
from tests.packed_tools import adapter_config, tiny_checkpoint
from tests.recipe.recipe_text import GOOD, problems_with

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}
EVERY = Rotation(1, r1=True, r2=(True, True), r4=(True, True))
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), **SMALL), dtype="float32")


@pytest.fixture(scope="module")
def folded(plain: Checkpoint) -> FoldedCheckpoint:
    return FoldedCheckpoint(plain, EVERY)


def section(**changes: Any) -> QuantSection:
    return QuantSection.model_validate({"bits": 8, "group_size": 32, "calibrate": "absmax"} | changes)


def text() -> list[dict[str, Tensor]]:
    return [{"input_ids": IDS}, {"input_ids": IDS + 5}]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_packed_in_8_bits_it_is_nearly_the_original(plain: Checkpoint, folded: FoldedCheckpoint) -> None:
    want = logits(load_model(plain, "eager"))
    model, _ = quantize(folded, section(), attention="eager")
    assert far(logits(model), want) < 0.02
    down = [name for name, layer in packed_layers(model) if layer.input_transform is not None]
    assert down == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    for name in down:
        model.get_submodule(name).input_transform = None
    assert far(logits(model), want) > 0.1, "the Hadamard is not needed"


def test_the_residual_teacher_is_in_the_rotated_basis_with_its_online_op(
    plain: Checkpoint, folded: FoldedCheckpoint
) -> None:
    model, _ = quantize(folded, section(bits=4), attention="eager")
    want = logits(load_model(plain, "eager"))
    with unrounded(model):
        teacher = far(logits(model), want)
    assert teacher < 0.3 * far(logits(model), want)


@pytest.mark.parametrize("calibrate", ["gptq", "signround"])
def test_walks_compare_in_one_basis(calibrate: str, plain: Checkpoint, folded: FoldedCheckpoint) -> None:
    """Two bases would be a loss near 1 and logits of another model; 8 bits leave next to nothing."""
    quant = section(calibrate=calibrate, calibration={"steps": 2})
    model, table = quantize(folded, quant, attention="eager", calibration=text)
    assert far(logits(model), logits(load_model(plain, "eager"))) < 0.02
    if calibrate == "signround":
        losses = {float(row.reason.split()[-3]) for row in table.quantized}
        assert losses and max(losses) < 1e-2


def test_layers_are_fitted_in_one_basis(plain: Checkpoint, folded: FoldedCheckpoint) -> None:
    model, _ = quantize(folded, section(), attention="eager")
    attach(model, adapter_config("lr_qat"))
    options = ReconstructSection.model_validate({"steps": 1, "learning_rate": 1e-4})

    def before(dense: Checkpoint) -> list[float]:
        cpu = torch.device("cpu")
        fits = reconstruct(
            model, dense, text(), options, seed=0, device=cpu, dtype=torch.float32, attention="eager"
        )
        return [fit.before for fit, _ in fits]

    assert max(before(folded)) < 1e-2
    assert max(before(plain)) > 0.5, "the original's hidden states are in another basis"


def test_what_is_written_is_read_back_with_its_op(
    plain: Checkpoint, folded: FoldedCheckpoint, tmp_path: Path
) -> None:
    model, _ = quantize(folded, section(bits=4), attention="eager")
    write_model(tmp_path / "native", folded, merged_weights(model), EXPORTERS["native"])
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["quantization_config"]["hadamard"] == list(folded.online_layers)
    assert config["tie_word_embeddings"] is False
    back = load_exported(tmp_path / "native", attention="eager")
    assert isinstance(back.model.layers[1].mlp.down_proj.input_transform, OnlineHadamard)
    assert torch.equal(logits(back), logits(model))
    back.save_pretrained(tmp_path / "again")  # by transformers, which asks the model itself
    assert torch.equal(logits(load_exported(tmp_path / "again", attention="eager")), logits(model))
    with pytest.raises(ValueError, match="a Hadamard stays before it.*set r4: false"):
        write_model(tmp_path / "ct", folded, merged_weights(model), EXPORTERS["compressed-tensors"])


@pytest.fixture(scope="module")
def turned() -> tuple[FoldedCheckpoint, Any]:
    """The tiny Llama, trained and with a tokenizer, r1 and r2 folded; and packed."""
    checkpoint = FoldedCheckpoint(
        Checkpoint.open(TINY, dtype="float32"), Rotation(1, r1=True, r2=(True,) * 4)
    )
    return checkpoint, quantize(checkpoint, section(bits=4, residual_bits=0), attention="eager")[0]


@pytest.mark.parametrize("name", EXPORTERS)
def test_without_r4_every_format_carries_it(
    name: str, turned: tuple[FoldedCheckpoint, Any], tmp_path: Path
) -> None:
    """Norms, embedding and head of the files are the folded ones, or the reader would say something else."""
    checkpoint, model = turned
    exporter = EXPORTERS[name]
    if reason := exporter.reject(IntGrid(bits=4, group_size=32)) or exporter.missing(exporter.reads_with):
        pytest.skip(f"{name}: {reason}")
    write_model(tmp_path / name, checkpoint, merged_weights(model), exporter)
    read = load_exported(tmp_path / name, dtype=torch.float32)
    assert far(logits(read), logits(model)) < (1e-5 if not exporter.tolerance else exporter.tolerance)


def test_a_lora_goes_on_in_the_other_basis(plain: Checkpoint, tmp_path: Path) -> None:
    """(W + B A) folded is W folded + B' A', with smoothing too; and init_from fills B' A'."""
    smooth = {"model.layers.0.input_layernorm": torch.linspace(0.5, 2, 64, dtype=torch.float64)}
    turned = FoldedCheckpoint(plain, Rotation(1, r1=True, r2=(True,) * 2, r4=(True,) * 2, smooth=smooth))
    torch.manual_seed(3)
    for name, matrix in turned.matrices.items():
        if ".layers." not in name:
            continue
        n, k = matrix.shape
        a, b = torch.randn(4, k), torch.randn(n, 4)
        fold = turned.fold_of(name)
        assert fold is not None
        weight = plain.matrix(name)
        want = fold.matrix(weight + b @ a, turned.gain) - fold.matrix(weight, turned.gain)
        a2, b2 = turned.turn_lora(name, a, b)
        torch.testing.assert_close(b2 @ a2, want, rtol=1e-4, atol=1e-4)
    make_lora(plain.folder, tmp_path / "lora")
    lora = read_lora(tmp_path / "lora")
    kind: Any = ADAPTERS["dl_qat"]
    config = kind(method="dl_qat", rank=4, alpha=8)
    model, _ = quantize(turned, section(bits=4), attention="eager")
    attach(model, config)
    start_from_lora(model, config, lora, turned.turn_lora)
    for name in lora.pairs:
        a, b = turned.turn_lora(name, *lora.factors(name))
        torch.testing.assert_close(product(model, name), lora.gains[name] * (b @ a))


def test_what_is_packed_already_is_refused(
    plain: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, _ = quantize(plain, section(), attention="eager")
    write_model(tmp_path / "ct", plain, merged_weights(model), EXPORTERS["compressed-tensors"])
    with pytest.raises(ValueError, match="is quantized already.*full-precision checkpoint"):
        FoldedCheckpoint(Checkpoint.open(tmp_path / "ct", dtype="float32"), EVERY)
    for key in ("quant.rotation.kind=hadamard", "quant.smooth=0.5"):
        problems = problems_with(
            GOOD.replace("quant:\n  bits: 4\n  group_size: 128\n", ""), ("model.path=ct", key)
        )
        assert any("ct is quantized already, and a rotation would round it anew" in text for text in problems)


def test_a_table_is_written_piece_by_piece(folded: FoldedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.cat(list(folded.stored_pieces("model.embed_tokens.weight")))
    monkeypatch.setattr("lowbit_ft.rotations.checkpoint.PIECE", 640)
    pieces = list(folded.stored_pieces("model.embed_tokens.weight"))
    assert len(pieces) > 1 and torch.equal(torch.cat(pieces), whole)
    head = torch.cat(list(folded.stored_pieces("lm_head.weight")))
    assert torch.equal(head, whole), "tied before, and the gain of the last norm is one here"
