"""Sign planes in integer formats: exact when their scales are tied, refused with the way out when not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft.export import EXPORTERS, LayerSpec
from lowbit_ft.export.planes import held, integer_grid, tied, to_integers
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import check_model, write_model
from lowbit_ft.grid import BinaryGrid, BinaryWeight
from lowbit_ft.model.checkpoint import Checkpoint
from tests.packed_tools import IDS, packed_model, random_weight, random_weights, tiny_checkpoint


def tied_weight(weight: Any, seed: int = 0) -> BinaryWeight:
    """The same planes with scales s, 2 s, 4 s, ..., in another order in every group."""
    q = weight.grid.bits
    order = torch.rand(weight.scale.shape, generator=torch.Generator().manual_seed(seed)).argsort(0)
    powers = 2.0 ** torch.arange(q)
    return replace(weight, scale=(weight.scale[:1].float() * powers[order]).to(weight.scale.dtype))


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
def test_tied_planes_are_integers_bit_for_bit(planes: int, group: int, scale_dtype: str) -> None:
    weight = random_weight((6, 100), BinaryGrid(bits=planes, group_size=group, scale_dtype=scale_dtype))
    assert isinstance(weight, BinaryWeight) and tied(weight) == (planes == 1)
    weight = tied_weight(weight)
    assert tied(weight)
    integers = to_integers(weight)
    assert (
        integers.grid == integer_grid(weight.grid) and integers.grid.bits == {1: 2, 2: 3, 3: 4, 4: 8}[planes]
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(integers.dequantize(dtype), weight.dequantize(dtype))
    odd = integers.unpack_codes().int() - integers.grid.levels // 2
    assert bool((odd % 2 == 1).all()) and int(odd.abs().max()) == 2**planes - 1


def test_untied_planes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    weight = random_weight((6, 64), BinaryGrid(bits=2, group_size=64))
    with pytest.raises(ValueError, match="not tied"):
        to_integers(weight)  # type: ignore[arg-type]
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "c"), dtype="float32")
    weights = random_weights(source.empty_model(), BinaryGrid(bits=3, group_size=64))
    for name in ("compressed-tensors", "gguf", "gptq"):
        with pytest.raises(
            ValueError, match=rf"{name} has no sign planes, and the scales of 7 layers.*export.format: native"
        ):
            write_model(tmp_path / "m", source, weights, EXPORTERS[name])
        with pytest.raises(ValueError, match="sign planes"):  # as it is asked before training
            check_model(source, {n: LayerSpec.of(w) for n, w in weights.items()}, EXPORTERS[name])
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("planes", [1, 3])
def test_tied_planes_ship_as_integers_and_verify(planes: int, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "c"), dtype="float32")
    weights = {
        name: tied_weight(weight, seed=i)
        for i, (name, weight) in enumerate(
            random_weights(source.empty_model(), BinaryGrid(bits=planes, group_size=64)).items()
        )
    }
    exporter = EXPORTERS["compressed-tensors"]
    write_model(tmp_path / "m", source, weights, exporter)
    model = packed_model(source, weights)  # type: ignore[arg-type]
    assert torch.equal(load_exported(tmp_path / "m")(IDS).logits, model(IDS).logits)
    assert verify(tmp_path / "m", weights, model=model, input_ids=IDS).ok
    specs = {name: LayerSpec.of(weight) for name, weight in weights.items()}
    if planes == 1:
        check_model(source, specs, exporter)  # before training: whatever the scales become, one plane is tied
    assert held(EXPORTERS["native"], BinaryGrid(bits=1)) == BinaryGrid(bits=1)
    assert held(exporter, BinaryGrid(bits=1)) == integer_grid(BinaryGrid(bits=1)) and held(
        exporter, BinaryGrid(bits=2)
    ) == BinaryGrid(bits=2)
