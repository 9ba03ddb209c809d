"""The law: merge() ships the very codes and scales that the training forward multiplied with. Bit for bit, no
tolerance.

For every entry of ADAPTERS on every grid it accepts, with random trained tensors, in fp32 and bf16:

    codes of the forward == codes of merge           caught on their way into the matmul
    adapter(identity) == merged.dequantize().T       the weight the forward used, seen through its output
    d adapter(x) / dx  == merged.dequantize()        the weight the backward used
    a new process finds the same codes and dense weights in the saved file

A method may be left out only by declaring `exact_merge = False`.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from functorch.compile import make_boxed_func
from safetensors.torch import save_file
from torch._dynamo.backends.common import aot_autograd

from lowbit_ft.adapters import ADAPTERS, AdapterConfig
from lowbit_ft.adapters.scale import ScaleAdapter
from lowbit_ft.grid import BinaryGrid, BinaryWeight, Grid, IntGrid, PackedWeight
from tests.adapters.common import K, N, base_of, trained
from tests.adapters.law_reader import fingerprint
from tests.packed_tools import adapter_config

INEXACT = {"lora"}  # the only one, by name: another entry that opts out must be discussed here
GROUPS = (32, 64, 128, -1)
DTYPES = (torch.float32, torch.bfloat16)
# Options that change what is computed, beyond every method's defaults.
VARIANTS: dict[str, list[dict[str, object]]] = {
    "lr_qat": [{"clip": "clip_then_round"}],
    "dl_qat": [{"clip": "clip_then_round"}],
    "l4q": [{"offset": "float"}, {"offset": "integer"}, {"offset": "none", "clip": "round_then_clip"}],
    "lota": [{"offset": "float"}, {"threshold": 0.4}],
    "alpha_tuning": [{"planes": "first"}],
    "full_qat": [{"master": "none"}],
    "ef_qat": [{"master": "bf16"}],
}


class Case(NamedTuple):
    config: AdapterConfig
    grid: Grid

    @property
    def shape(self) -> tuple[int, int]:
        """Rows enough that ef_qat trains some of them."""
        return (N if self.config.method != "ef_qat" else 3 * N, K)

    @property
    def name(self) -> str:
        options = self.config.model_dump(exclude={"method", "rank"}, exclude_defaults=True)
        residual = f" f{self.grid.residual_bits}" if isinstance(self.grid, IntGrid) else ""
        return "-".join([self.config.method, *map(str, options.values()), f"{self.grid}{residual}"])


def grids(kind: str) -> Iterator[Grid]:
    if kind == "binary":
        for bits, group_size in itertools.product((1, 2, 3, 4), GROUPS):
            yield BinaryGrid(bits=bits, group_size=group_size)
    else:
        for bits, group_size, symmetric, f in itertools.product((2, 3, 4, 8), GROUPS, (True, False), (4, 0)):
            yield IntGrid(bits=bits, group_size=group_size, symmetric=symmetric, residual_bits=f)
        for symmetric, f in ((True, 4), (False, 4), (True, 0)):
            yield IntGrid(bits=6, group_size=64, symmetric=symmetric, residual_bits=f)


def configs(method: str) -> Iterator[AdapterConfig]:
    for variant in [{}, *VARIANTS.get(method, [])]:
        yield adapter_config(method, **variant)


def cases() -> list[Case]:
    exact = [method for method, config in ADAPTERS.items() if config.exact_merge]
    return [
        Case(config, grid)
        for method in exact
        for config in configs(method)
        for grid in grids(config.grid_name)
        if config.reject(grid) is None
    ]


CASES = cases()


def test_nobody_is_left_out():
    assert {m for m, config in ADAPTERS.items() if not config.exact_merge} == INEXACT
    covered = {
        (c.config.method, c.grid.bits, c.grid.group_size, getattr(c.grid, "symmetric", None)) for c in CASES
    }
    wanted = set()
    for method, config in ADAPTERS.items():
        if config.exact_merge and config.grid_name == "binary":
            wanted |= set(itertools.product([method], (1, 2, 3, 4), GROUPS, [None]))
        elif config.exact_merge:
            wanted |= set(itertools.product([method], (2, 3, 4, 8), GROUPS, (True, False)))
            wanted |= {(method, 6, 64, True), (method, 6, 64, False)}
    assert wanted and covered == wanted
    # A residual of 0 may be refused, but only with a reason that names the way out.
    refused = [
        (c, g) for m in ADAPTERS for c in configs(m) for g in grids(c.grid_name) if c.reject(g) is not None
    ]
    assert {c.method for c, _ in refused} <= {"l4q"}
    assert all("residual_bits: 4" in str(c.reject(g)) for c, g in refused)


@pytest.fixture
def forward_codes(monkeypatch) -> list[torch.Tensor]:
    """The packed codes that every grid_linear hands to the matmul."""
    seen: list[torch.Tensor] = []
    module = sys.modules["lowbit_kernels.grid_linear"]
    matmul = module.packed_matmul

    def spy(x, codes, *rest):
        seen.append(codes)
        return matmul(x, codes, *rest)

    monkeypatch.setattr(module, "packed_matmul", spy)
    return seen


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_trained_is_what_ships(case: Case, forward_codes: list[torch.Tensor]):
    base = base_of(case.grid, case.shape)
    adapter = trained(case.config, base)
    merged = adapter.merge(base)
    n, k = base.shape
    assert merged.grid == case.config.shipped(base.grid)
    assert not torch.equal(merged.dequantize(), base.dequantize()), (
        "training moved nothing: the law would be empty"
    )
    moves = isinstance(merged, PackedWeight) and not isinstance(adapter, ScaleAdapter)
    if moves and isinstance(base, PackedWeight):
        assert not torch.equal(merged.codes, base.codes)
        assert (merged.offset is not None) == case.config.ships_offset
    for dtype in DTYPES:
        weight = merged.dequantize(dtype)
        x = torch.eye(k, dtype=dtype, requires_grad=True)
        forward_codes.clear()
        y = adapter(x, base)
        if isinstance(merged, PackedWeight):
            assert len(forward_codes) == 1 and torch.equal(forward_codes[0], merged.codes)
        assert torch.equal(y, weight.t())
        # dY = I[:k] picks W's rows as the input gradient of the first min(K, N) inputs.
        dy = torch.eye(k, n, dtype=dtype)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx[:n], weight[: min(n, k)])
        with torch.no_grad():
            assert torch.equal(merged.linear(x), y), "the merged layer and the adapted one differ"
    assert torch.equal(adapter.merge(base).dequantize(), merged.dequantize()), "merging twice differs"


@pytest.mark.parametrize("method", [m for m, config in ADAPTERS.items() if config.exact_merge])
def test_autocast_does_not_change_the_codes(method: str):
    """Mixed precision trains under autocast and merges without: the low-rank product must not be done in
    bf16.
    """
    config = next(configs(method))
    base = base_of(next(iter(grids(config.grid_name))), (64, 128))
    adapter = trained(config, base)
    merged = adapter.merge(base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapter(torch.eye(128, dtype=torch.bfloat16), base)
        inside = adapter.merge(base)
    assert inside.digest() == merged.digest()
    assert torch.equal(y, merged.dequantize(torch.bfloat16).t())


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("method", [m for m, config in ADAPTERS.items() if config.exact_merge])
def test_other_scale_dtypes(method: str, scale_dtype: str):
    kind = BinaryGrid if ADAPTERS[method].grid_name == "binary" else IntGrid
    base = base_of(kind(group_size=32, scale_dtype=scale_dtype))
    adapter = trained(next(configs(method)), base)
    merged = adapter.merge(base)
    assert merged.scale.dtype == getattr(torch, scale_dtype)
    for dtype in DTYPES:
        assert torch.equal(adapter(torch.eye(base.shape[1], dtype=dtype), base), merged.dequantize(dtype).t())


class Traced(torch.nn.Module):
    def __init__(self, config: AdapterConfig, base):
        super().__init__()
        self.adapter, self.base = trained(config, base), base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.adapter(x, self.base)


def rounds_a_scale(method: str) -> AdapterConfig:
    """The first of its configs that rounds a scale or an offset in its forward."""
    return next(config for config in configs(method) if config.trains_scales or config.ships_offset)


@pytest.mark.parametrize("method", [m for m, config in ADAPTERS.items() if config.exact_merge])
def test_a_compiler_sees_no_rounding_it_could_drop(method: str):
    """TorchInductor computes elementwise chains in fp32 and drops a cast to bf16 inside them, so none may be
    visible to it.
    """
    config = rounds_a_scale(method)
    module = Traced(config, base_of(next(iter(grids(config.grid_name)))))
    seen: list[str] = []

    def look(graph, _inputs):
        seen.extend(f"{n.target} {n.args} {n.kwargs}" for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    torch.compile(module, fullgraph=True, backend=backend)(torch.randn(2, 200)).sum().backward()
    assert any("lowbit.round_values" in call for call in seen)
    # The base's bf16 scale is widened to fp32, which is exact; nothing is narrowed and no exp is left to be
    # approximated.
    visible = [call for call in seen if not call.startswith("lowbit.")]
    assert not [call for call in visible if "aten.exp." in call or "torch.bfloat16" in call]


@pytest.mark.slow
@pytest.mark.no_cover  # counting slows the compiler down, and the lines are those of the plain law
@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize("method", [m for m, config in ADAPTERS.items() if config.exact_merge])
def test_the_law_holds_when_compiled(method: str):
    config = rounds_a_scale(method)
    base = base_of(next(iter(grids(config.grid_name))))
    module = Traced(config, base)
    torch._dynamo.reset()
    y = torch.compile(module, fullgraph=True)(torch.eye(base.shape[1]))
    assert torch.equal(y, module.adapter.merge(base).dequantize().t())


def test_a_new_process_reads_the_same_weights(tmp_path: Path):
    """One process for the whole table: it recomputes digests and dense weights from the file alone."""
    assert len(CASES) > 300
    tensors, facts, wanted = {}, {}, {}
    for case in CASES:
        base = base_of(case.grid, case.shape)
        merged = trained(case.config, base).merge(base)
        tensors |= {f"{case.name}/{name}": t.contiguous() for name, t in merged.to_tensors().items()}
        facts[case.name] = json.dumps({"grid": merged.grid.to_json(), "shape": merged.shape})
        wanted[case.name] = fingerprint(merged)
    assert len(wanted) == len(CASES), "two cases share a name"
    path = tmp_path / "merged.safetensors"
    save_file(tensors, path, metadata=facts)
    done = subprocess.run(
        [sys.executable, "-m", "tests.adapters.law_reader", str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_the_law_would_notice():
    """A merge that recomputes with another rounding of the low-rank product breaks the comparison above."""
    base = base_of(IntGrid(bits=4, group_size=32))
    assert isinstance(base, PackedWeight) and not isinstance(base, BinaryWeight)
    adapter = trained(ADAPTERS["lr_qat"](rank=4), base)
    shipped = adapter.merge(base)
    with torch.no_grad():
        adapter.A.copy_(adapter.A.bfloat16())
    assert not torch.equal(adapter(torch.eye(base.shape[1]), base), shipped.dequantize().t())
