"""benchmarks/gpu.sh walks its stages on a CPU, keeps no figures, and says what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_report, gpu_smoke

ROOT = Path(__file__).parents[2]


def slot(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {
        **os.environ,
        "PYTHON": sys.executable,
        "OUT": str(folder),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = ["bash", "benchmarks/gpu.sh", *options]
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_dry_run_walks_every_stage_and_leaves_nothing(tmp_path: Path):
    done = slot(tmp_path, "--dry-run", TRAIN="memory")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for stage in ("correctness of the kernels", "targets of the kernels", "training step"):
        assert f"=== {stage}: status 0" in done.stdout
    assert "| decode M=1, 4 bit | cublas | >= 3.20x |" not in done.stdout  # a dry run has no figures to show
    assert "Correctness: 16 of 16 passed" in done.stdout and list(tmp_path.iterdir()) == []


def test_options_and_a_machine_without_a_gpu_are_errors(tmp_path: Path):
    assert slot(tmp_path, "--fast").returncode == 2
    done = slot(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "--dry-run walks the plan on a CPU" in done.stdout + done.stderr


def test_a_test_that_killed_its_process_is_a_failure_and_the_rest_goes_on(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    rows = gpu_smoke.Rows(file)
    rows.begin("good")
    rows.end("good", "passed", error=1e-3)
    rows.begin("deadly")
    with file.open("a") as out:
        out.write('{"name": "cut of')
    again = gpu_smoke.Rows(file)
    assert again.done == {"good", "deadly"}
    again.begin("next")
    merged = {row["name"]: row for row in gpu_smoke.merge([file], tmp_path / "all.jsonl", final=True)}
    assert merged["good"]["error"] == 1e-3 and merged["deadly"]["problem"] == "its process died"
    assert merged["next"]["outcome"] == "cut off"


def test_a_problem_is_told_in_a_line_without_this_machine_s_paths():
    said = f"{ROOT}/tests/x.py:3: in f\nE   AssertionError: 1 > {ROOT}/y\n"
    assert gpu_smoke._short(said) == "AssertionError: 1 > ./y"


def test_the_report_holds_what_the_stages_left_and_what_is_missing(tmp_path: Path):
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "environment.json").write_text(
        json.dumps({"gpu": "X", "date": "today", "commit": "abc", "torch": "2.11"})
    )
    (parts / "cannot_train").write_text("not installed: pydantic\n")
    (parts / "stages.jsonl").write_text(json.dumps({"name": "correctness", "status": 1, "seconds": 3}) + "\n")
    rows = [
        {"name": "a", "outcome": "passed"},
        {"name": "b", "outcome": "failed", "problem": "wrong"},
        {"name": "c", "outcome": "skipped"},
    ]
    (parts / "smoke.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = gpu_report.table(gpu_report.gather(parts))
    assert "Correctness: 1 of 2 passed, 1 skipped." in text and "* failed: `b`: wrong" in text
    assert "Training step: not run (not installed: pydantic)." in text and "| correctness | 3 | 1 |" in text


def test_the_committed_results_say_nothing_of_the_machine():
    for file in (ROOT / "benchmarks" / "results").glob("gpu-*"):
        text = file.read_text(encoding="utf-8")
        assert not any(
            word in text for word in ("/home/", "/tmp/", "/work/", "/opt/", "platform", "hostname")
        ), file
