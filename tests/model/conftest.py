"""What the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint_tools import MODELS, random_checkpoint


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return random_checkpoint(tmp_path / "llama", MODELS["llama"]())
