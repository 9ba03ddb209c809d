"""Packing straight to base/: one layer in memory, whatever the number of layers; the same bytes as packing in
memory; killed, nothing.
"""

from __future__ import annotations

import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit_ft import pipeline
from lowbit_ft.adapters.attach import base_digest, packed_layers
from lowbit_ft.evaluate import perplexity as evaluate
from lowbit_ft.export import EXPORTERS, LayerSpec, Weights
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.writer import write_model
from lowbit_ft.grid import BinaryGrid, Grid, IntGrid, stack_rows
from lowbit_ft.grid.calibrate import CALIBRATORS
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.walk import LayerWalk
from lowbit_ft.quantize import inputs
from lowbit_ft.quantize import memory as quantize_memory
from lowbit_ft.quantize import quantize as quantize_module
from lowbit_ft.quantize.quantize import Packing, quantize
from lowbit_ft.recipe.layers import read_shapes
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.signals import tokens as token_sums
from lowbit_ft.stages import quantize as quantize_stage
from tests.forks import run
from tests.live_bytes import LiveBytes
from tests.packed_tools import random_weight
from tests.quantize.test_quantize import CONFIGS, checkpoint_of, tokens

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SECTIONS: dict[str, dict[str, Any]] = {
    "mse": {"bits": 4, "calibrate": "mse"},
    "minmax": {"bits": 3, "symmetric": False, "calibrate": "minmax"},
    "gptq": {"bits": 3, "calibrate": "gptq", "lm_head": 8, "embeddings": 8},
    "planes": {"grid": "binary", "bits": 2, "calibrate": "alternating"},
}


def section(name: str) -> QuantSection:
    return QuantSection.model_validate({"group_size": 32} | SECTIONS[name])


def llama(folder: Path, layers: int = 3, tied: bool = False) -> Checkpoint:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=tied,
    )
    return checkpoint_of(config, folder)


def packing(checkpoint: Checkpoint, name: str) -> Packing:
    return Packing(checkpoint, section(name), calibration=lambda: tokens(4))


def written(
    checkpoint: Checkpoint, name: str, folder: Path, seen: Callable[[str, Any], None] | None = None
) -> Packing:
    """The stage of the pipeline: base/ written as it is packed."""
    made = packing(checkpoint, name)

    def take(layer: str) -> Any:
        weight = made.take(layer)
        if seen is not None:
            seen(layer, weight)
        return weight

    write_model(
        folder,
        checkpoint,
        Weights({n: LayerSpec(*spec) for n, spec in made.specs.items()}, take),
        EXPORTERS["native"],
    )
    return made


@pytest.mark.parametrize("model", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("name", SECTIONS)
def test_what_is_written_layer_by_layer_is_what_is_packed_in_memory(
    name: str, model: str, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(CONFIGS[model](), tmp_path / "dense")
    made = written(checkpoint, name, tmp_path / "base")
    whole, table = quantize(checkpoint, section(name), calibration=lambda: tokens(4))
    read = load_exported(tmp_path / "base", dtype=torch.float32)
    assert base_digest(read) == base_digest(whole) and list(dict(packed_layers(read))) == list(
        dict(packed_layers(whole))
    )
    with torch.no_grad():
        assert torch.equal(read(**tokens(1)[0]).logits, whole(**tokens(1)[0]).logits)
    assert made.table == table and len(table.quantized) == len(made.specs)


@pytest.mark.parametrize("name", SECTIONS)
def test_no_more_is_held_for_more_layers(name: str, tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 6):
        checkpoint = llama(tmp_path / f"dense{layers}", layers)
        last: list[Any] = []

        def alone(layer: str, weight: Any, last: list[Any] = last) -> None:
            if name != "gptq":  # whose walk goes on through the packed layer
                assert not last or last[-1]() is None, "the layer before is still held"
            last.append(weakref.ref(weight.scale))

        with LiveBytes() as counted:
            made = written(checkpoint, name, tmp_path / f"base{layers}", alone)
        assert len(last) == 7 * layers + 2 * (name == "gptq")
        dense = [n for n, p in made.model.named_parameters() if not p.is_meta]
        assert not dense, "the model of a streamed packing stays on meta"
        peaks.append(counted.peak)
    assert peaks[1] <= 1.02 * peaks[0]
    if name != "gptq":  # whose factor alone is larger than layers as narrow as these
        assert peaks[1] < 4 * (6 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192) + 2 * 128 * 64) // 2, (
            "half of the dense model"
        )


@pytest.mark.parametrize("name", ["mse", "minmax", "planes"])
def test_blocks_of_rows_give_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = llama(tmp_path)
    digests = {n: w.digest() for n, w in packing(checkpoint, name)}
    monkeypatch.setattr(quantize_module, "BLOCK_BYTES", 64 * 4 * 7)
    sizes: list[int] = []
    real = Checkpoint.matrix
    monkeypatch.setattr(
        Checkpoint, "matrix", lambda *a, **k: (sizes.append((m := real(*a, **k)).nbytes), m)[1]
    )
    assert {n: w.digest() for n, w in packing(checkpoint, name)} == digests
    assert max(sizes) <= 192 * 4 * 7 and len(sizes) > 10 * len(digests)


@pytest.mark.parametrize(
    "grid",
    [
        IntGrid(bits=3, group_size=32, symmetric=False),
        IntGrid(residual_bits=0),
        BinaryGrid(bits=2, group_size=64),
    ],
    ids=str,
)
def test_stacked_rows_are_the_weight(grid: Grid) -> None:
    weight = random_weight((11, 200), grid)
    assert stack_rows([weight.rows(0, 4), weight.rows(4, 5), weight.rows(5, 11)]).digest() == weight.digest()


def test_hessians_in_several_passes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of(CONFIGS["mixtral"](), tmp_path)
    digests = {n: w.digest() for n, w in packing(checkpoint, "gptq")}
    held: list[int] = []
    real = quantize_module.curvatures
    monkeypatch.setattr(quantize_module, "curvatures", lambda *a: (held.append(len(a[2])), real(*a))[1])
    monkeypatch.setattr(inputs, "HESSIAN_BYTES", 3 * 4 * 64 * 64)
    assert {n: w.digest() for n, w in packing(checkpoint, "gptq")} == digests
    assert max(held) == 3 and len(held) > 3 * 3


@pytest.mark.parametrize(("inputs", "streams"), [("quantized", 3), ("mixed", 3), ("dense", 2)])
def test_what_waits_where_a_layer_is_fitted_is_foretold(inputs: str, streams: int, tmp_path: Path) -> None:
    """signround keeps two hidden states of every token, reconstruct as many as it has streams; and packing a
    whole layer is counted by its linears."""
    llama(tmp_path / "dense")
    changes = [
        f"model.path={tmp_path / 'dense'}",
        "quant.group_size=32",
        "quant.calibrate=signround",
        "quant.calibration.samples=10",
        "quant.calibration.sequence_len=32",
        f"train.reconstruct={{inputs: {inputs}, samples: 6, sequence_len: 16}}",
        "eval.kl=false",
    ]
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", changes, check=False)
    shapes = read_shapes(tmp_path / "dense")
    foretold = quantize_memory.quantize_memory(recipe, shapes)
    rest = 2 * 16 * 4 + 8  # cosines and sines, positions
    assert foretold.calibration == 10 * 32 * (2 * 64 * 4 + 32 + rest)
    assert foretold.reconstruction == 6 * 16 * (streams * 64 * 4 + 16 + rest)
    linears = [layer for layer in shapes.linears if ".0." in layer.name]
    weights = sum(layer.out_features * layer.in_features for layer in linears)
    assert len(linears) == 7 and foretold.hessians == 0
    assert foretold.work == CALIBRATORS["signround"].block_bytes * weights and foretold.layer > 4 * weights


def test_gptq_reads_no_head_and_what_waits_is_what_was_foretold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = llama(tmp_path / "dense")
    read: list[str] = []
    real = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint, "read", lambda self, name, **k: (read.append(name), real(self, name, **k))[1]
    )
    model = checkpoint.empty_model()
    windows = [
        {
            "input_ids": torch.randint(0, 128, (2, 32)),
            "position_ids": torch.arange(32).remainder(20).repeat(2, 1),
        }
        for _ in range(5)
    ]
    walk = LayerWalk(model, checkpoint, windows, CPU, torch.float32, logits=False)
    assert "lm_head.weight" not in read and model.lm_head.weight.is_meta
    walk.forget_rest()
    assert model.model.embed_tokens.weight.is_meta and walk.hidden[0].shape == (2, 32, 64)
    recipe = load_recipe(
        ROOT / "recipes" / "quickstart.yaml",
        [
            f"model.path={tmp_path / 'dense'}",
            "model.dtype=float32",
            "quant.calibrate=gptq",
            "quant.group_size=32",
            "quant.calibration.samples=10",
            "quant.calibration.sequence_len=32",
            "eval.windows=3",
            "eval.window=16",
        ],
        check=False,
    )
    foretold = quantize_memory.quantize_memory(recipe, read_shapes(tmp_path / "dense"))
    # What the layers are given (a mask, cosines and sines) is one set per batch, not one per layer.
    assert walk.held_bytes() == foretold.calibration == 10 * 32 * (64 * 4 + 32 + 2 * 16 * 4 + 8)
    assert (
        foretold.reference == 3 * 16 * (64 * 4 + 16 + 2 * 16 * 4 + 8) and foretold.cpu == foretold.calibration
    )
    assert foretold.layer == 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64 + 2 * 64)
    assert foretold.outside == foretold.reference_device - foretold.layer == 4 * (2 * 128 * 64 + 64)
    assert foretold.hessians == 4 * (6 * 64**2 + 192**2) and foretold.work == (4 + 12) * 192 * 64
    sorted_ = load_recipe(
        ROOT / "recipes" / "quickstart.yaml",
        [
            f"model.path={tmp_path / 'dense'}",
            "quant.calibrate=gptq",
            "quant.group_size=32",
            "quant.calibration.act_order=true",
        ],
        check=False,
    )
    more = quantize_memory.quantize_memory(sorted_, read_shapes(tmp_path / "dense"))
    assert more.work == foretold.work + 4 * 192**2
    unwalked = load_recipe(ROOT / "recipes" / "quickstart.yaml", ["eval.kl=false"], check=False)
    plain = quantize_memory.quantize_memory(unwalked, read_shapes(tmp_path / "dense"))
    assert (plain.calibration, plain.reference, plain.reference_device, plain.hessians) == (
        0,
        0,
        0,
        0,
    ) and plain.device == plain.work == (2 * 2 + 64) * 192 * 64


def test_evaluation_a_few_tokens_at_a_time_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = llama(tmp_path)
    model, _ = quantize(checkpoint, section("mse"))
    batches = [b | {"labels": torch.where(torch.rand(2, 24) < 0.3, -100, b["input_ids"])} for b in tokens(2)]
    reference = evaluate.Reference(checkpoint, batches, attention="sdpa", device=CPU, dtype=torch.float32)
    rows = [evaluate.evaluate(model, batches, "quantized", reference)]
    monkeypatch.setattr(token_sums, "FLOATS_AT_A_TIME", 5 * 128)
    with LiveBytes() as counted:
        rows.append(evaluate.evaluate(model, batches, "quantized"))
    assert rows[1].loss == pytest.approx(rows[0].loss, rel=1e-12) and rows[1].tokens == rows[0].tokens
    assert evaluate.evaluate(model, batches, "quantized", reference).kl == pytest.approx(
        rows[0].kl, rel=1e-12
    )
    assert 0 < counted.peak


CHILD = """
import os, signal, sys
from lowbit_ft import pipeline
from lowbit_ft.quantize import quantize
from lowbit_ft.recipe.recipe import load_recipe
real, count = quantize.Packing.take, []
def take(self, name):
    count.append(name)
    if len(count) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, name)
quantize.Packing.take = take
pipeline.quantize(load_recipe(sys.argv[1], sys.argv[2:], check=False))
"""
QUICK = ["quant.calibrate=absmax", "eval.generate=[]"]


def recipe(out: Path, *changes: str) -> Any:
    return load_recipe(ROOT / "recipes" / "quickstart.yaml", [*QUICK, f"output={out}", *changes], check=False)


def test_a_killed_quantize_leaves_nothing_that_loads_and_the_next_one_packs_all_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    done = run(["-c", CHILD, ROOT / "recipes" / "quickstart.yaml", *QUICK, f"output={out}"])
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = out.glob(".base.lowbit_ft-*.partial")
    assert not (out / "base").exists() and left.is_dir()
    with pytest.raises(ValueError, match="config.json: missing"):
        load_exported(left)
    pipeline.quantize(recipe(out))
    assert "base: reusing" not in capsys.readouterr().out and not left.exists()
    pipeline.quantize(recipe(tmp_path / "other"))
    assert (out / "base.json").read_bytes() == (tmp_path / "other" / "base.json").read_bytes()
    assert base_digest(load_exported(out / "base")) == base_digest(load_exported(tmp_path / "other" / "base"))


def test_a_base_whose_key_was_not_written_belongs_to_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between base/ and base.json of a second recipe: the first recipe must not take it for its
    own.
    """
    out = tmp_path / "run"
    pipeline.quantize(recipe(out))
    first = base_digest(load_exported(out / "base"))

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(quantize_stage, "load_packed", stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.quantize(recipe(out, "quant.bits=3"))
    assert base_digest(load_exported(out / "base")) != first
    pipeline.quantize(recipe(out))
    assert base_digest(load_exported(out / "base")) == first
