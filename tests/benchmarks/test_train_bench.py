"""benchmarks/train_bench.py without a GPU: its shapes are the public ones, its contenders really step, its
table says what it must.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from benchmarks.train_bed import Bench
from benchmarks.train_bench import correct, memory
from benchmarks.train_cases import LENGTH, MEMORY, QLORA, SPEED, Case
from benchmarks.train_contender import Contender, grid_of, head_of
from benchmarks.train_models import SHAPES, packed, sharing
from benchmarks.train_report import table, write_report
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import packed_layers

CPU = torch.device("cpu")
PUBLIC = {"8b": 8_030_261_248, "14b": 14_770_033_664, "32b": 32_763_876_352, "70b": 70_553_706_496}


def bench(tmp_path: Path, **changes: Any) -> Bench:
    options = {
        "dry_run": True,
        "budget": 1e9,
        "cap": 24.0,
        "rounds": 1,
        "layers": None,
        "out": tmp_path / "rows.json",
        **changes,
    }
    return Bench(argparse.Namespace(**options))


@pytest.mark.parametrize("name", PUBLIC)
def test_shapes_have_the_parameters_of_the_public_models(name: str) -> None:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(SHAPES[name].config())
    assert sum(p.numel() for p in model.parameters()) == PUBLIC[name]


def test_every_case_names_a_method_that_takes_its_grid() -> None:
    for case in [*SPEED, *MEMORY, LENGTH]:
        if case.base == "packed":
            config = ADAPTERS[case.method]
            assert config.model_validate({"method": case.method}).reject(grid_of(case)) is None, case.name
    assert len({case.name for case in SPEED}) == len(SPEED) and QLORA.base == "nf4"


def test_a_packed_model_is_what_it_says() -> None:
    case = replace(MEMORY[0], shape="tiny", group_size=32)
    model = packed(SHAPES["tiny"], grid_of(case), CPU, torch.float32, head=head_of(case))
    grids = {name.rpartition(".")[2]: layer.grid for name, layer in packed_layers(model)}
    assert len(list(packed_layers(model))) == 2 * 7 + 2
    assert grids["q_proj"] == grid_of(case) and grids["lm_head"] == grids["embed_tokens"] == head_of(case)
    assert not any(p.dim() > 1 for p in model.parameters())  # nothing of 16 bit but the norms
    codes = model.model.layers[0].mlp.down_proj.base.unpack_codes()
    assert codes.unique().tolist() == list(range(16))
    # an ordinary deviation, so activations stay of an ordinary size
    assert model.model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_contenders_share_a_base_and_train_their_own(tmp_path: Path) -> None:
    case = replace(
        SPEED[0].tiny(), train={"learning_rate": 0.05}
    )  # at 1e-3 four steps move no code and no bf16 scale
    base = packed(SHAPES["tiny"], grid_of(case), CPU, torch.float32)
    one, two = (
        Contender(replace(case, method=method), sharing(base), str(tmp_path))
        for method in ("lr_qat", "dl_qat")
    )
    weights = [c.model.model.layers[1].self_attn.k_proj for c in (one, two)]
    assert (
        weights[0].codes.data_ptr()
        == weights[1].codes.data_ptr()
        == base.model.layers[1].self_attn.k_proj.codes.data_ptr()
    )
    assert weights[0].adapter is not None and base.model.layers[1].self_attn.k_proj.adapter is None
    before = [p.detach().clone() for p in one.run.names]
    losses = [float(one.step()) for _ in range(4)]
    assert losses[-1] < losses[0]  # the same window again and again
    assert any(not torch.equal(a, b) for a, b in zip(before, one.run.names, strict=True))
    assert one.steps == 4 and two.steps == 0


def test_memory_cases_step_and_are_written_as_rows(tmp_path: Path) -> None:
    found = bench(tmp_path)
    memory(found)
    assert [row["name"] for row in found.rows] == [case.name for case in MEMORY]
    assert all("seconds" in row and "skipped" not in row for row in found.rows), found.rows
    assert not (tmp_path / "rows.json").exists()  # a dry run keeps no figures


def test_a_method_whose_gradients_are_wrong_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowbit_ft.adapters.scale import ScaleAdapter

    found, forward = bench(tmp_path), ScaleAdapter.forward
    layers: dict[ScaleAdapter, int] = {}

    def wrong(self: ScaleAdapter, x: torch.Tensor, base: Any) -> torch.Tensor:
        number = layers.setdefault(self, len(layers))
        return forward(self, x, base) * (
            1.0 if number < 14 else 1.1
        )  # the first model's layers are right, the second's wrong

    monkeypatch.setattr(ScaleAdapter, "forward", wrong)
    cases = [case for case in SPEED if case.name == "scale W4"]
    monkeypatch.setattr("benchmarks.train_bench.SPEED", cases)
    correct(found)
    assert "worst relative gradient error" in found.rows[0]["skipped"]
    assert found.attempt("speed", cases[0], lambda case: {"seconds": 1.0}, 0) is None
    assert "its gradients are wrong" in found.rows[1]["skipped"]


def test_no_time_left_and_out_of_memory_are_rows(tmp_path: Path) -> None:
    def full(case: Case) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    found = bench(tmp_path, budget=100)
    assert (
        found.attempt("memory", MEMORY[0], full, 10) is None
        and "Tried to allocate 2.00 GiB" in found.rows[-1]["skipped"]
    )
    assert (
        found.attempt("memory", MEMORY[0], lambda case: {"peak_gb": 1.0}, 500) is None
        and "no time left" in found.rows[-1]["skipped"]
    )


def test_the_table_says_met_missed_and_not_measured(tmp_path: Path) -> None:
    def row(name: str, **values: Any) -> dict[str, Any]:
        return {"stage": "speed", "name": name, "case": {"base": "packed"}, **values}

    rows = [
        row("good", tokens_per_s=1234.0, ratio=1.2, peak_gb=7.0, target=["ratio", 1.35], met=True),
        row("slow", tokens_per_s=999.0, ratio=1.5, peak_gb=7.0, target=["ratio", 1.35], met=False),
        row("absent", skipped="bitsandbytes is not installed", target=["ratio", 1.35], met=None),
    ]
    lines = table(rows)
    assert lines[2] == "| good | 1234 | 1.2 | 7 | step / QLoRA's <= 1.35 | met |"
    assert "MISSED" in lines[3] and "not measured: bitsandbytes is not installed" in lines[4]
    file = tmp_path / "train_bench-gpu.json"
    file.write_text(json.dumps({"environment": {"gpu": "X"}, "rows": rows}))
    assert "# Training step on X" in write_report(file) and file.with_suffix(".png").stat().st_size > 1000
