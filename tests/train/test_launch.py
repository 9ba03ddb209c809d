"""Runs that were launched: the line by `accelerate launch`, and what accelerate must have set up for it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from lowbit_ft import pipeline
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.train import setup as train_setup
from lowbit_ft.train.setup import TrainError, make_accelerator
from tests.forks import Forked
from tests.toy import section
from tests.train.two_processes import ROOT, packed


@pytest.mark.parametrize(("used", "count"), [("FSDP", 1), ("DEEPSPEED", 1), ("MULTI_CPU", 2)])
def test_accelerate_must_have_set_up_what_was_launched(
    used: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(distributed_type=DistributedType(used), num_processes=count)
    monkeypatch.setattr(train_setup, "Accelerator", lambda **_: fake)
    with pytest.raises(
        TrainError, match=f"accelerate has set up {used} with {count} processes, and 1 were launched"
    ):
        make_accelerator(section(), tmp_path, packed())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


COMMON = [
    "train.max_steps=2",
    "train.micro_batch_size=1",
    "train.eval_every=null",
    "train.save_every=null",
    "data.train.limit=60",
    "data.valid.limit=3",
    "data.sequence_len=64",
    "quant.bits=3",
]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("launch") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        more = ["train.gradient_accumulation_steps=2", f"output={folder}"]
        pipeline.train(load_recipe("recipes/quickstart.yaml", [*COMMON, *more]))
    return folder


@pytest.mark.parametrize("machines", [1, 2])
def test_the_line_by_accelerate_launch_ships_what_one_process_ships(
    machines: int, one: Path, tmp_path: Path
) -> None:
    """The documented configurations, their numbers given on the command line; the merged bytes are the same.
    Two machines are two launches that meet at a port."""
    two = tmp_path / "two"
    config = ROOT / "docs" / "accelerate" / ("one-machine.yaml" if machines == 1 else "two-machines.yaml")
    command = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    line = ["-m", "lowbit_ft", "train", "recipes/quickstart.yaml", *COMMON]
    line += ["train.gradient_accumulation_steps=1", "train.sharding=fsdp"]
    place = (
        [] if machines == 1 else ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    )
    launched = [
        Forked([*command, *place, "--machine_rank", rank, *line, f"output={two}"]) for rank in range(machines)
    ]
    try:
        said = [process.communicate(timeout=600)[1][-4000:] for process in launched]
    finally:
        for process in launched:
            process.kill()
    assert [process.returncode for process in launched] == [0] * machines, said
    for path in ("merged/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (one / path).read_bytes() == (two / path).read_bytes(), path
    held_by = json.loads((two / "processes.json").read_text())
    assert held_by["type"] == "FSDP2" and len(held_by["ranks"]) == 2 and not (one / "processes.json").exists()
    assert all(row["base"] <= 0.55 * row["whole_base"] for row in held_by["ranks"])
