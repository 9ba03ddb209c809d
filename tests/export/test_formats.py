"""The formats through the readers of other people's servers: the real reader finds the same weights.

The readers of gptq, awq and mlx are large and pin other versions, so these tests skip where they are not
installed; run this file in an environment that has them.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowbit_ft.export import EXPORTERS, base
from lowbit_ft.export.mlx import MlxModel
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import write_model
from lowbit_ft.model.checkpoint import Checkpoint
from tests.export.common import GGUF, GRIDS, checkpoint, needs_reader
from tests.packed_tools import IDS, int_grid, packed_model, random_weights

ASYMMETRIC = ("gptq_v2", "awq", "torchao")


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq", "mlx", "torchao"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_formats_own_reader_agrees(name: str, dtype: str, tmp_path: Path) -> None:
    needs_reader(name)
    source = checkpoint(tmp_path / "c", dtype=dtype, num_hidden_layers=2)
    weights = random_weights(source.empty_model(), int_grid(symmetric=name not in ASYMMETRIC))
    weights = {
        layer: weight for layer, weight in weights.items() if "o_proj" not in layer
    }  # stays dense in every block
    write_model(tmp_path / "m", source, weights, EXPORTERS[name])
    report = verify(
        tmp_path / "m", weights, model=lambda: packed_model(source, weights), source=source.folder
    )
    assert report.ok and report.logit_difference is not None and report.answers is not None
    assert (
        "scales and weights equal" in str(report)
        if name == "torchao"
        else "codes and scales equal" in str(report)
    )
    if name == "torchao":
        assert report.logit_difference == 0
    with pytest.raises(ValueError, match="1 of 12 layers differ|12 of 12"):
        other = random_weights(source.empty_model(), int_grid(symmetric=name not in ASYMMETRIC))
        first = next(iter(weights))
        verify(
            tmp_path / "m",
            weights
            | {first: other[next(n for n in other if n != first and other[n].shape == other[first].shape)]},
        )


@pytest.mark.slow
@pytest.mark.parametrize("grid", [g for g in GRIDS if g.bits != 4 and g.group_size in (64, -1)], ids=str)
def test_gptq_of_other_widths_through_gptqmodel(grid: Any, wide: Checkpoint, tmp_path: Path) -> None:
    needs_reader("gptq_v2")
    weights = random_weights(wide.empty_model(), grid)
    for weight in weights.values():
        weight.scale.mul_(2.0 ** (4 - grid.bits))  # weights of one size at all widths, as in real models
    write_model(tmp_path / "m", wide, weights, EXPORTERS["gptq_v2"])
    expected = packed_model(wide, weights)(IDS).logits
    with torch.no_grad():
        assert (
            load_exported(tmp_path / "m")(IDS).logits - expected
        ).abs().max() < 1e-2 * expected.abs().max()


def test_mixed_bits_through_mlx(wide: Checkpoint, tmp_path: Path) -> None:
    needs_reader("mlx")
    weights = random_weights(
        wide.empty_model(),
        {"down_proj": int_grid(bits=8, group_size=32), "o_proj": int_grid(bits=3), "": int_grid(bits=2)},
    )
    write_model(tmp_path / "m", wide, weights, EXPORTERS["mlx"])
    assert verify(tmp_path / "m", weights, model=packed_model(wide, weights), source=wide.folder).ok


def test_a_reader_that_is_not_there_is_named_with_its_extra(
    wide: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights(wide.empty_model(), int_grid())
    extras = {"gguf": "gguf", "gptq": "gptq", "awq": "gptq", "mlx": "mlx", "torchao": "torchao"}
    for name in extras:
        write_model(tmp_path / name, wide, weights, EXPORTERS[name])
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    for name, extra in extras.items():
        for read in (load_exported, lambda folder: verify(folder, weights)):
            with pytest.raises(
                ValueError, match=rf"reading {name} needs .*pip install 'lowbit-ft\[{extra}\]'"
            ):
                read(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"gguf needs gguf, not installed here; run pip install 'lowbit-ft\[gguf\]'"
    ):
        write_model(tmp_path / "again", wide, weights, GGUF)
    assert not (tmp_path / "again").exists()


def test_an_mlx_answer_ends_at_its_stop_token() -> None:
    model = MlxModel.__new__(MlxModel)
    torch.nn.Module.__init__(model)
    model.stops = frozenset([5])
    model.forward = lambda ids: SimpleNamespace(
        logits=torch.nn.functional.one_hot(ids + 1, 16).float()
    )  # counts up
    assert model.generate(torch.tensor([[2]]), max_new_tokens=9).tolist() == [[2, 3, 4, 5]]
    assert model.generate(torch.tensor([[2]]), max_new_tokens=2).tolist() == [[2, 3, 4]]
