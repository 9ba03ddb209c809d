"""What a run with the sparsity of CONTRIBUTING.md has to show (tests/test_families.py)."""

import json
from typing import Any

import torch

from lowbit_ft.export.reader import load_exported, read_weights


def every_second_weight(run: Any) -> None:
    """Zero in the base, which keeps the mask, in merged/ and in what a reader makes of the export."""
    base, merged = (read_weights(run.folder / name) for name in ("base", "merged"))
    served, moved = load_exported(run.shipped, dtype=torch.float32), 0
    served(torch.tensor([[3, 4]]))  # this reader unpacks in its first forward
    for name, spec in base.specs.items():
        start, end = base[name], merged[name]
        n, k = spec.shape
        zeros = (torch.arange(n)[:, None] + torch.arange(k)) % 2 == 1
        assert torch.equal(start.locked, zeros) and spec.grid.mask and not merged.specs[name].grid.mask
        shipped = served.get_submodule(name).weight.detach()
        for weight in (start.dequantize(), end.dequantize(), shipped):
            assert not weight[zeros].any() and weight[~zeros].any()
        assert torch.equal(shipped, end.dequantize())
        moved += int((start.unpack_codes() != end.unpack_codes()).sum())
    assert len(base.specs) == 7 and moved > 0
    rows = json.loads((run.folder / "quant.json").read_text())
    assert [row["zeros"] for row in rows if row["zeros"]] == [s.elements // 2 for s in base.specs.values()]
    assert "50.0% of these integers stand for zero" in (run.shipped / "README.md").read_text()
    assert "are zero in every stage, 50.0 % of them" in (run.folder / "report.html").read_text()
