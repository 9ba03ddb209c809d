"""The quant section of a checkpoint that is quantized already: read from the files, and nothing that says
otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.incoming import resolve_quant
from lowbit_ft.recipe.sections.model import ModelSection
from lowbit_ft.recipe.sections.quant import QuantSection
from tests.incoming.common import equal, graft, packed, resolved
from tests.incoming_tools import PROJECTIONS, quantized_checkpoint
from tests.packed_tools import IDS, tiny_checkpoint


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
        ({"calibration": {"samples": 9}}, "quant.calibration: set, but q is quantized already"),
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
    agreeing |= {"embeddings": 8}  # dense there, and packed here
    agreeing |= {"calibration": {"samples": 9}, "activations": {"kind": "tensor", "dynamic": False}}
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
    graft(tmp_path / "q", tmp_path / "q8")
    quant = resolved(tmp_path / "q")
    assert [(o.match, o.bits, o.group_size) for o in quant.overrides] == [
        ("model.layers.0.mlp.down_proj", 8, 32)
    ]
    model, _ = packed(tmp_path / "q")
    for name in four:
        wanted = eight if name.endswith("down_proj") else four
        assert equal(model.get_submodule(name).base, wanted[name]), name


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
        ValueError,
        match="v_proj are not packed there, but quant.targets, exclude and convolutions choose them",
    ):
        quantize(Checkpoint.open(tmp_path / "q"), quant)


def test_symmetric_and_asymmetric_layers_in_one_checkpoint_become_overrides(tmp_path: Path) -> None:
    flat = quantized_checkpoint(tmp_path / "q", "compressed-tensors", symmetric=True)
    other = quantized_checkpoint(tmp_path / "a", "compressed-tensors", source=tmp_path / "q-dense")
    graft(tmp_path / "q", tmp_path / "a")
    quant = resolved(tmp_path / "q")
    (override,) = quant.overrides
    assert quant.symmetric and override.given == {"symmetric": False}
    assert override.match == "model.layers.0.mlp.down_proj"
    model, _ = packed(tmp_path / "q")
    for name in flat:
        wanted = other if name.endswith("down_proj") else flat
        assert equal(model.get_submodule(name).base, wanted[name]), name
    said = QuantSection.model_validate({"overrides": [{"match": "down_proj", "bits": 8}]})
    (problem,) = resolve_quant(ModelSection(path=str(tmp_path / "q")), said)[1]
    assert "down_proj 8 bit, group 64, sym; q has it as W4 g64 asym" in str(problem)


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
