"""A small dense model, weights for it, and what the exporters made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowbit_ft.export.writer import write_model
from lowbit_ft.grid import BinaryGrid
from lowbit_ft.model.checkpoint import Checkpoint
from tests.export.common import NATIVE, checkpoint
from tests.packed_tools import int_grid, random_weights, tiny_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny"), dtype="float32")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Wide enough for every group of every format, and with a tokenizer."""
    return checkpoint(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def weights(source: Checkpoint) -> dict[str, Any]:
    return random_weights(source.empty_model(), int_grid(bits=3))


@pytest.fixture(scope="module")
def native_folder(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native folder with planes, zero points and residuals. Who changes its files puts them back."""
    target = tmp_path_factory.mktemp("fuzz") / "m"
    grids = {
        "o_proj": BinaryGrid(bits=2),
        "down_proj": int_grid(symmetric=False, residual_bits=2),
        "": int_grid(bits=2),
    }
    write_model(target, source, random_weights(source.empty_model(), grids), NATIVE)
    return target
