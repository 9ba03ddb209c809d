"""train.compile: one graph for all layers and none broken, names as they were, and the law through the
trainer.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch._dynamo.utils import counters

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapted_layers, begin_step, keep_codes
from lowbit_ft.data.batches import Batches
from lowbit_ft.grid import BinaryGrid, IntGrid
from lowbit_ft.merge import merged_weight
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.train import compiling, prepare
from lowbit_ft.train.compiling import compile_layers, missing_compiler
from lowbit_ft.train.loop import train
from lowbit_ft.train.setup import TrainError
from tests.packed_tools import adapted_llama, adapter_config
from tests.toy import Toy, batches, equal, examples, quiet, section, state

CHEAP = {"low_rank_gradient": "corrected", "scale_grad_tokens": 0.3}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def llama(method: str = "lr_qat", layers: int = 2, **options: Any) -> Any:
    model = adapted_llama(
        adapter_config(method, rank=3, **options),
        BinaryGrid(bits=2, group_size=32)
        if method == "alpha_tuning"
        else IntGrid(bits=3, group_size=32, residual_bits=4, symmetric=False),
        num_hidden_layers=layers,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(0, 0.5)
    return model


def gradients(model: Any, length: int = 7) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    ids = torch.arange(2 * length).view(2, length) % 23
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.no_cover  # counting slows the compiler down, and the lines are those of the test below
@pytest.mark.parametrize("method", [m for m in ADAPTERS if m not in ("lr_qat", "l4q")])
def test_no_graph_break_in_any_method(method: str):
    test_no_graph_break_and_the_same_gradients(method, {})


@pytest.mark.parametrize(("method", "options"), [("lr_qat", CHEAP), ("l4q", {"offset": "float"})])
def test_no_graph_break_and_the_same_gradients(method: str, options: dict[str, Any]):
    """fullgraph: a break would be an error. With aot_eager nothing is fused, so every bit must be the plain
    run's.
    """
    model = llama(method, **options)
    torch.manual_seed(5)  # of the tokens that are drawn
    want = gradients(model)
    undo = compile_layers(model, backend="aot_eager")
    torch.manual_seed(5)
    assert (
        equal(gradients(model), want)
        and counters["stats"]["unique_graphs"] == 2
        and not counters["graph_break"]
    )
    undo()
    assert all("forward" not in vars(layer) for layer in model.model.layers)


@pytest.mark.no_cover
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layers_share_what_is_compiled(checkpointing: bool):
    """Four layers, three lengths, kept codes that are new in every step: a graph per kind of input
    (transformers' own switch for recomputation makes the first one want a gradient too), then as many with
    lengths as variables. How many there are is the same for every backend; this one makes no code of them."""
    model, plain = llama(layers=4), llama(layers=4)
    for m in (model, plain):
        keep_codes(m, m is model)
        if checkpointing:
            m.activation_checkpointing_enable()
    compile_layers(model, backend="eager")
    found = []
    for step, length in enumerate((7, 7, 9, 11)):
        begin_step(model, step)
        assert equal(gradients(model, length), gradients(plain, length))
        found.append(counters["stats"]["unique_graphs"])
        with torch.no_grad():
            for m in (model, plain):
                m.model.layers[0].mlp.up_proj.adapter.B.add_(0.3)
    assert found == ([1, 1, 2, 2] if checkpointing else [2, 2, 4, 4])


def test_only_training_forwards_are_compiled_and_names_stay():
    model = llama()
    names, logits = list(model.state_dict()), model.eval()(input_ids=torch.arange(5)[None]).logits
    undo = compile_layers(model, backend="aot_eager")
    assert list(model.state_dict()) == names and not any(
        "_orig_mod" in name for name, _ in model.named_modules()
    )
    with torch.no_grad():
        assert torch.equal(model.train()(input_ids=torch.arange(5)[None]).logits, logits)
    assert torch.equal(model.eval()(input_ids=torch.arange(5)[None]).logits, logits)
    assert counters["stats"]["unique_graphs"] == 0
    undo()


def test_kept_codes_are_not_read_by_a_compiled_forward_that_nobody_checks():
    """torch.compile by the user: the slot cannot be asked from inside, so the codes are made anew."""
    model, plain = llama(), llama()
    keep_codes(model, True)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    layer.train()(x)
    layer.adapter.kept.codes.fill_(-1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), plain.model.layers[0].mlp.up_proj.train()(x))


def test_a_layer_that_breaks_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        prepare, "compile_layers", partial(compile_layers, backend="eager")
    )  # before any code

    class Asking(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.nonzero().shape[0] if x.sum().item() > 0 else x

    model = llama()
    model.model.layers[1].mlp.act_fn = Asking()
    with pytest.raises(
        ValueError,
        match="train.compile: LlamaDecoderLayer cannot be compiled whole .*set train.compile: false",
    ):
        train(
            model,
            Batches(examples(5), 1, 0, 0),
            None,
            section(max_steps=1, compile=True),
            tmp_path,
            console=quiet(),
        )
    with pytest.raises(TrainError, match="train.compile: got true, but Toy: no list of decoder layers"):
        train(Toy(), batches(), None, section(max_steps=1, compile=True), tmp_path / "toy", console=quiet())


def test_a_machine_without_a_compiler_is_told_with_the_recipe(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    assert missing_compiler(on_gpu=False) == "a C++ compiler, and neither g++ nor clang++ is on the PATH"
    assert "gcc" in str(missing_compiler(on_gpu=True)) or "triton" in str(missing_compiler(on_gpu=True))
    quick = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    with pytest.raises(RecipeError, match="train.compile: got true, which needs a C.*set compile: false"):
        load_recipe(quick, ["train.compile=true"])
    load_recipe(quick, ["train.compile=false"])
    monkeypatch.setattr(compiling.shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    assert missing_compiler(on_gpu=False) is None


class Multiplied:
    """The codes and scales that every packed product of the training forwards was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.wanted: list[Any] = []
        self.checks = 0
        module = sys.modules["lowbit_kernels.grid_linear"]
        matmul = module.packed_matmul

        def spy(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, *rest: Any) -> torch.Tensor:
            self.used.append((codes, scale))
            return matmul(x, codes, scale, *rest)

        monkeypatch.setattr(module, "packed_matmul", spy)

    def step(self, model: Any) -> None:
        """Every weight of the step before was multiplied with, and nothing else was; then the next ones."""
        if self.wanted:
            assert len(self.used) >= 2 * len(self.wanted)  # forward and recomputation
            for codes, scale in self.used:
                assert any(
                    codes.shape == w.codes.shape
                    and torch.equal(codes, w.codes)
                    and torch.equal(scale, w.scale.float())
                    for w in self.wanted
                )
            for w in self.wanted:
                assert any(
                    codes.shape == w.codes.shape and torch.equal(codes, w.codes) for codes, _ in self.used
                )
            self.checks += 1
        self.used.clear()
        self.wanted = [merged_weight(layer) for _, layer in adapted_layers(model)]


def losses_of(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler on the CPU")
def test_the_law_holds_in_every_step_of_a_compiled_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """TorchInductor, recomputation and offload on: what each step multiplies with is what merge would ship
    before it, bit for bit. One method, for the g++ it takes: the others meet TorchInductor in
    tests/adapters/test_law.py and the compiled layers of a run above. And windows of one length; with
    LOWBIT_COMPILE=all in the environment of several, which compiles all once more.
    """
    length = None if os.environ.get("LOWBIT_COMPILE") == "all" else 9
    model, plain, law = llama(**CHEAP), llama(**CHEAP), Multiplied(monkeypatch)

    def on_step(step: int) -> None:
        begin_step(model, step)
        law.step(model)

    data, common = Batches(examples(11, length=length), 2, 0, 0), {"max_steps": 4, "max_grad_norm": 10.0}
    setting = section(**common, compile=True, gradient_checkpointing=True, offload="cpu", eval_every=10)
    valid = Batches(examples(3, seed=1), 1, 0, 0)
    train(model, data, valid, setting, tmp_path, on_step=on_step, console=quiet())
    assert law.checks == 3, "a step was not looked at"
    assert counters["stats"]["unique_graphs"] >= 2, "nothing was compiled"
    # Attention over segments is Python between two graphs, and nothing else is.
    assert len(counters["graph_break"]) == 1 and all(
        "function attend" in reason for reason in counters["graph_break"]
    )
    with safe_open(next((tmp_path / "checkpoints").glob("*/adapter.safetensors")), "pt") as file:
        assert set(file.keys()) == set(state(model)) and not any("_orig_mod" in key for key in file.keys())
    data = Batches(examples(11, length=length), 2, 0, 0)
    train(plain, data, None, section(**common), tmp_path / "plain", console=quiet())
    eager = losses_of(tmp_path / "plain")
    assert len(eager) == 4 and losses_of(tmp_path) == pytest.approx(eager, rel=1e-3)
