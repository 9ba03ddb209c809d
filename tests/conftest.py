"""What all tests share: a fixed seed, hypothesis without deadlines, and memory that is poisoned where nobody
wrote.
"""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Two shared cores: a deadline would measure the neighbours. Derandomized: a red test is red on every machine.
settings.register_profile("lowbit", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("lowbit")

# TorchInductor starts processes that import torch and then wait for Triton kernels; a CPU has none for them.
os.environ["TORCH_WARM_POOL"] = "0"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes of the repository name their model and data from its root."""
    monkeypatch.chdir(Path(__file__).resolve().parents[1])


@pytest.fixture
def poison():
    """torch.empty and its kin give NaN (floats) and the largest value (integers), so that reading what was
    never written shows.

    PyTorch does the filling, below every way to get uninitialized memory (torch.empty, new_empty, empty_like,
    out=).
    """
    fill, strict = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.int16) == 32767).all()
    yield
    torch.use_deterministic_algorithms(strict)
    torch.utils.deterministic.fill_uninitialized_memory = fill
