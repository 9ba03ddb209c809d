"""benchmarks/peers.py: what lies on a grid passes and what does not is refused by name; a row is what the
tool left; the tables say what the rows say. No peer is installed here: our own script stands for all of them.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers, peers_cases, peers_table
from benchmarks.peers_cases import CONTENDERS, GRIDS, MODELS, TOOLS, Grid
from benchmarks.peers_measure import Bench, bits_per_weight, check_layer, check_weights, cut, most_values
from tests.forks import run

HERE = Path(peers.__file__).resolve().parent


def on_grid(grid: Grid, n: int = 3, k: int = 70) -> tuple[Tensor, Tensor, Tensor | None]:
    """A random weight [n, k] that uses every code of its grid, and its scale and zero [n, G]; one scale is
    negative."""
    generator = torch.Generator().manual_seed(grid.bits)
    size = k if grid.group_size == -1 else grid.group_size
    groups = -(-k // size)
    codes = torch.randint(0, 2**grid.bits, (n, k), generator=generator)
    codes[:, :2] = torch.tensor([0, 2**grid.bits - 1])
    scale = torch.rand(n, groups, generator=generator).bfloat16().float() + 0.5
    scale[0, 0] *= -1
    zero = None if grid.symmetric else torch.randint(0, 2**grid.bits, (n, groups), generator=generator)
    at = torch.full((n, groups), 2 ** (grid.bits - 1)) if zero is None else zero

    def wide(t: Tensor) -> Tensor:
        return t.repeat_interleave(size, dim=1)[:, :k]

    return wide(scale) * (codes - wide(at)), scale, zero


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_on_its_grid_passes_and_one_off_it_does_not(bits: int, group: int, symmetric: bool) -> None:
    grid = Grid(bits, group, symmetric)
    weight, scale, zero = on_grid(grid)
    check_layer("a", weight, scale, zero, grid)
    assert most_values(weight, group) <= 2**bits

    def refused(words: str, weight: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        with pytest.raises(ValueError, match=f"^a: .*{words}"):
            check_layer("a", weight, scale, zero, grid)

    moved = weight.clone()
    moved[1, :2] += 0.3 * scale[1, 0]  # the others of its group keep their values
    refused("different values|of a step off", moved, scale, zero)
    refused("of a step off|codes from", weight * 1.3, scale, zero)
    wider = weight.clone()
    wider[2] += 2**bits * scale[2, 0]  # whole steps, out of range
    refused("codes from|different values|of a step off", wider, scale, zero)
    refused("scales", weight, scale[:, :0], zero)
    if symmetric:
        refused("zero points other than", weight, scale, torch.zeros_like(scale))


def test_too_many_values_in_a_group_are_found_in_the_last_short_one() -> None:
    weight = torch.zeros(2, 70)
    weight[1, 64:] = torch.arange(6.0)
    assert most_values(weight, 32) == 6 and most_values(weight[:, :64], 32) == 1


def test_a_layer_that_was_left_out_is_named_and_the_bits_count_scales_and_zeros() -> None:
    grid = Grid(3, 32, False)
    weight, scale, zero = on_grid(grid, k=64)
    assert zero is not None
    tensors = {"a.weight": weight, "a.scale": scale, "a.zero": zero}
    assert check_weights(tensors, {"a": (3, 64)}, grid) == 3 + (16 + 3) / 32
    assert (
        bits_per_weight(scale, zero + 0.5, 3 * 64, 3) == 3 + 32 / 32
    )  # a zero that is no integer takes 16 bits
    assert bits_per_weight(scale, None, 3 * 64, 3) == 3 + 16 / 32
    for names in ({"a": (3, 64), "b": (3, 64)}, {}):
        with pytest.raises(ValueError, match="1 layers for"):
            check_weights(tensors, names, grid)
    with pytest.raises(ValueError, match="a: shape"):
        check_weights(tensors, {"a": (64, 3)}, grid)


def test_the_tables_name_tools_models_and_grids_that_are_there() -> None:
    assert MODELS and TOOLS and GRIDS.keys() == MODELS.keys()
    assert {contender.tool for contender in CONTENDERS.values()} == TOOLS.keys()
    for tool in TOOLS.values():
        assert (HERE / "peer_tools" / tool.script).is_file()
        assert not tool.packages or tool.packages[0].startswith("torch==")
    for grids in GRIDS.values():
        assert len({Grid.parse(text) for text in grids}) == len(grids) > 0
    with pytest.raises(ValueError, match="allowed: bits:group_size:sym"):
        Grid.parse("4:128:both")


def test_a_missing_environment_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--install"):
        peers.python_of("hqq", tmp_path)


def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny Llama on few rows and windows."""
    model = replace(
        MODELS["tiny-llama"],
        rows=8,
        windows=4,
        train=lambda: peers_cases.source_files("train.jsonl")[:3],
        valid=lambda: peers_cases.source_files("valid.jsonl")[:3],
    )
    monkeypatch.setitem(MODELS, "tiny-llama", model)


def forked(command: list[str], variables: dict[str, str], log: Path) -> dict[str, float]:
    """`run_tool` in a process that need not import first; its seconds are not counted."""
    done = run(command[1:], variables)
    assert done.returncode == 0, done.stderr
    return {"cpu_seconds": 0.0, "wall_seconds": 0.0}


def test_rows_are_the_same_each_time_and_none_is_evaluated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit_ft.model.checkpoint import Checkpoint
    from lowbit_ft.model.load import load_tokenizer

    short(monkeypatch)
    model = MODELS["tiny-llama"]
    tokenizer = load_tokenizer(Checkpoint.open(str(model.path)))
    first, again = cut(model, tokenizer), cut(model, tokenizer)
    assert (
        torch.equal(first.rows, again.rows) and first.rows.shape == (8, 256) and first.valid.shape == (4, 256)
    )
    assert (
        len({tuple(row) for row in first.rows.tolist()} | {tuple(row) for row in first.valid.tolist()}) == 12
    )
    with pytest.raises(ValueError, match="windows; 100000 are asked for"):
        cut(replace(model, rows=100000), tokenizer)


@pytest.mark.slow
def test_a_row_is_made_once_and_again_when_its_contender_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The whole way with our own script, untrained and trained; the weights are those the base dequantizes
    to.
    """
    short(monkeypatch)
    out = tmp_path / "peers.json"
    o = argparse.Namespace(
        only=["plain", "short"], grids=["3:64:asym"], seeds=[0, 1], threads=1, out=out, venvs=tmp_path
    )
    monkeypatch.setitem(CONTENDERS, "plain", peers_cases.start(quant__calibrate="minmax"))
    monkeypatch.setitem(CONTENDERS, "short", peers_cases.trained("lr_qat", "minmax", steps=1))
    stored: dict[str, Any] = {"models": {}, "rows": []}
    first, known = peers.make_row, {}

    def one_process_a_contender(bench: Bench, contender: Any, *rest: Any) -> dict[str, Any]:
        """The row of the second seed is that of the first, which took a process."""
        if str(contender) not in known:
            known[str(contender)] = first(bench, contender, *rest)
            monkeypatch.setattr(peers, "run_tool", forked)  # one was started as the bench starts them
        return dict(known[str(contender)])

    monkeypatch.setattr(peers, "make_row", one_process_a_contender)
    assert peers.run_model("tiny-llama", stored, o) == 0
    assert json.loads(out.read_text()) == stored
    assert [(r["contender"], r["seed"]) for r in stored["rows"]] == [("plain", 0), ("short", 0), ("short", 1)]
    row = stored["rows"][0]
    assert row["layers"] == 28 and row["bits_per_weight"] == 3 + 19 / 64 and row["kl"] > 0
    assert row["perplexity"] > stored["models"]["tiny-llama"]["perplexity"]
    assert 0 < row["work_cpu_seconds"] < row["cpu_seconds"] and row["versions"]["torch"]

    monkeypatch.setattr(peers, "make_row", lambda *_: pytest.fail("a row that is there was made again"))
    peers.run_model("tiny-llama", copy.deepcopy(stored), o)
    changed = peers_cases.start(quant__calibrate="mse")
    monkeypatch.setitem(CONTENDERS, "plain", changed)
    made: list[Any] = []
    monkeypatch.setattr(peers, "make_row", lambda _, contender, *rest: made.append(contender) or dict(row))
    peers.run_model("tiny-llama", stored, o)
    assert made == [changed] and len(stored["rows"]) == 3


def test_the_measure_of_the_models_own_weights_is_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    short(monkeypatch)
    bench = Bench(MODELS["tiny-llama"])
    own = {f"{name}.weight": linear.weight.detach().clone() for name, linear in bench.linears.items()}
    same = bench.measure(own)
    assert same.perplexity == pytest.approx(bench.full_precision().perplexity, rel=1e-5)
    assert same.kl == pytest.approx(0, abs=1e-6)
    off = bench.measure({key: value * 0.9 for key, value in own.items()})
    assert off.kl is not None and off.kl > 1e-3 and bench.measure(own) == same


# ------------------------------------------------------------------------------------------------ tables


def row(contender: str, perplexity: float, seconds: float, seed: int = 0, bits: int = 2) -> dict[str, Any]:
    tool = "autoround" if contender == "AutoRound" else "ours"
    fact = {
        "model": "m",
        "contender": contender,
        "bits": bits,
        "group_size": 64,
        "symmetric": True,
        "seed": seed,
    }
    measured = {"perplexity": perplexity, "work_cpu_seconds": seconds, "inputs": "x"}
    return fact | measured | {"tool": asdict(peers_cases.Contender(tool))}


def test_the_table_has_means_spreads_and_seconds() -> None:
    rows = [
        row("gptq", 12, 5),
        row("AutoRound", 10, 70),
        row("AutoRound", 11, 90, seed=1),
        row("gptq", 9, 5, bits=4),
    ]
    assert peers_table.quality(rows).splitlines() == [
        "| | W4 g64 sym | W2 g64 sym |",
        "|---|--:|--:|",
        "| AutoRound |  | 10.500 ±0.707 (80 s) |",
        "| gptq | 9.000 (5 s) | 12.000 (5 s) |",
    ]


@pytest.mark.parametrize(
    "ours, seconds, said",
    [
        ([9.0, 9.1], 80, "| slow 9.050 ±0.071, 80 s | -1.450 | ahead |"),
        ([10.2, 10.3], 80, "| slow 10.250 ±0.071, 80 s | -0.250 | level |"),
        ([12.0, 12.1], 80, "| slow 12.050 ±0.071, 80 s | +1.550 | behind |"),
        ([9.0, 9.1], 85, "| gptq 14.000, 5 s | +3.500 | behind |"),  # too slow: the other one stands for us
    ],
)
def test_pairs_take_no_more_time_and_count_the_spread(ours: list[float], seconds: float, said: str) -> None:
    rows = [row("AutoRound", 10, 70), row("AutoRound", 11, 90, seed=1), row("gptq", 14, 5)]
    rows += [row("slow", value, seconds, seed=i) for i, value in enumerate(ours)]
    (line,) = peers_table.pairs(rows).splitlines()[2:]
    assert line == f"| W2 g64 sym | AutoRound 10.500 ±0.707, 80 s {said}"


def test_one_seed_gives_no_verdict_and_no_rival_is_said() -> None:
    lines = peers_table.pairs([row("AutoRound", 10, 70), row("gptq", 9, 5)]).splitlines()
    assert lines[-1].endswith("| -1.000 | ahead? |")
    assert (
        peers_table.pairs([row("AutoRound", 10, 1), row("gptq", 9, 5)])
        .splitlines()[-1]
        .endswith("| none | | |")
    )


def test_rows_of_other_inputs_are_not_in_the_tables() -> None:
    stored = {
        "models": {"m": {"inputs": "x", "perplexity": 8.0, "tokens": 1020}},
        "rows": [row("gptq", 9, 5), row("mse", 9, 5) | {"inputs": "older"}],
    }
    text = peers_table.tables(stored)["quality"]
    assert "m, full precision 8.000 on 1,020 tokens" in text and "gptq" in text and "mse" not in text
    page = peers_table.render("quality", "a\n<!-- quality -->\nold\n<!-- /quality -->\nb\n", stored)
    assert page == f"a\n<!-- quality -->\n\n{text}\n\n<!-- /quality -->\nb\n" and "old" not in page
