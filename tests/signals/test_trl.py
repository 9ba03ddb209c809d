"""DPO and ORPO beside trl's trainers (benchmarks/preference_trl.py has all of it)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.preference_trl import CASES, compare, packed_base


@pytest.mark.parametrize("name", ["dpo sigmoid", "dpo ipo", "orpo"])
def test_losses_by_step_are_those_of_trl(name: str, tmp_path: Path) -> None:
    found = compare(packed_base(tmp_path / "base"), tmp_path / "run", 3, CASES[name])
    assert found["ours"] == pytest.approx(found["trl"], abs=1e-4)
    assert max(found["apart"][key] for key in ("rewards/chosen", "rewards/rejected")) < 1e-4
    assert len(set(found["ours"])) > 1 and found["adapters apart"] < 1e-3
