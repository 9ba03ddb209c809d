"""The law of sparsity: a weight that the mask calls zero is zero in the base, in every forward, in merged/
and in the export; the count never falls. Over every integer method, grid and exporter.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_ft.adapters import ADAPTERS, AdapterConfig
from lowbit_ft.export import EXPORTERS, LayerSpec
from lowbit_ft.export.native import Native
from lowbit_ft.grid import IntGrid, PackedWeight
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.sparsity import PATTERNS, SPARSITY, Asked
from tests.adapters.common import trained
from tests.adapters.test_law import configs
from tests.packed_tools import adapter_config

N, K = 32, 160
GRIDS = [
    IntGrid(bits=b, group_size=32, symmetric=s, mask=True)
    for b, s in (*itertools.product((2, 3, 4, 8), (True, False)), (6, False))
]
MASKS = {"90 %": Asked(0.9), "2:4": Asked(0.5, PATTERNS["2:4"])}
KEPT = [
    config for method in ADAPTERS if ADAPTERS[method].grid_name == "integer" for config in configs(method)
]
SHIPPED = [
    adapter_config("lr_qat"),
    adapter_config("l4q", offset="integer"),
]  # the zero point stays, and moves
REFUSED = {  # the settings that cannot keep zeros, and the way out that is named
    "lora": ({}, "use lr_qat, dl_qat or l4q"),
    "l4q float": ({"offset": "float"}, "adapter.offset: auto or none"),
    "l4q warm-up": ({"warmup_steps": 3}, "warmup_steps: 0"),
    "lota float": ({"offset": "float"}, "adapter.offset: auto or none"),
    "lr_qat factorised": ({"low_rank_gradient": "factorised"}, "low_rank_gradient: exact"),
    "dl_qat corrected": ({"low_rank_gradient": "corrected"}, "low_rank_gradient: exact"),
}


def base_of(grid: IntGrid, asked: Asked) -> tuple[PackedWeight, Tensor]:
    """A base whose weights are not centred, so that zero points differ, and its zeros; other weights round to
    zero too."""
    zeros, left = SPARSITY["magnitude"].start(torch.randn(N, K) + 0.3, asked)
    base = CALIBRATORS["mse"].run(left, grid, Stats())
    assert isinstance(base, PackedWeight)
    return base.masked(zeros), zeros


def kept() -> Iterator[AdapterConfig]:
    for config in KEPT:
        if config.reject(GRIDS[0]) is None:
            yield config


def test_every_method_keeps_zeros_or_says_why_not() -> None:
    names = {config.method for config in kept()}
    assert (
        names == {name for name, c in ADAPTERS.items() if c.grid_name == "integer"} - {"lora"}
        and len(names) >= 7
    )
    for name, (options, way_out) in REFUSED.items():
        config = adapter_config(name.split()[0], **options)
        assert way_out in str(config.reject(GRIDS[0])) and config.reject(IntGrid(group_size=32)) is None


@pytest.mark.parametrize("asked", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zeros_stay_from_the_base_to_every_export(grid: IntGrid, asked: Asked) -> None:
    base, zeros = base_of(grid, asked)
    assert zeros.float().mean() == pytest.approx(asked.amount, abs=1e-3)
    eye = torch.eye(K, requires_grad=True)
    assert not base.dequantize()[zeros].any() and not base.dequantize_unrounded()[zeros].any()
    assert not base.linear_unrounded(eye.detach()).t()[zeros].any()
    count, exported = int((base.dequantize() == 0).sum()), []
    for config in kept():
        adapter = trained(config, base)
        y = adapter(eye, base)
        assert not y.t()[zeros].any(), config
        # The input's gradient is by the same weight, and what counts steps of a weight learns nothing there.
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, eye, dy, retain_graph=True)
        torch.testing.assert_close(dx, dy @ y.detach().t(), rtol=1e-4, atol=1e-4)
        if config.method == "full_qat":
            (dd,) = torch.autograd.grad(y, adapter.delta, dy)
            assert not dd[zeros].any() and dd[~zeros].any()
        merged = adapter.merge(base)
        assert isinstance(merged, PackedWeight) and merged.mask is None and not merged.grid.mask
        assert torch.equal(merged.dequantize(), y.detach().t())
        if getattr(adapter, "kind", "none") == "integer":
            assert merged.zero is not None
            start = torch.full_like(merged.zero, grid.levels // 2) if base.zero is None else base.zero
            assert not torch.equal(merged.zero, start), "the zero point trains, and the zeros go with it"
        left = merged.dequantize() == 0
        assert left[zeros].all() and int(left.sum()) >= int(zeros.sum()) and count >= int(zeros.sum())
        if config in SHIPPED:
            exported += [name for name, exporter in EXPORTERS.items() if _exported(exporter, merged, zeros)]
    held = ("native", "compressed-tensors", "onnx" if grid.bits == 6 else "gptq_v2")
    assert min(map(exported.count, held)) == len(SHIPPED)


def _exported(exporter: Any, merged: PackedWeight, zeros: Tensor) -> bool:
    """Whether the format holds it; then its own reader, if it is here, finds the zeros."""
    layer = LayerSpec.of(merged)
    if exporter.reject_model({"m.0.x": layer}):
        return False
    tensors = exporter.pack(merged)
    again = exporter.unpack(tensors, layer)
    assert not again.dequantize()[zeros].any(), exporter.name
    if not exporter.missing(exporter.reads_with):
        read = exporter.read_back(tensors, layer)
        points = torch.full(read.scale.shape, merged.grid.levels // 2) if read.zero is None else read.zero
        wide = points.t().repeat_interleave(32, dim=1).to(read.codes.dtype)
        assert torch.equal(read.codes[zeros], wide[zeros]), exporter.name
    return True


def test_a_mask_is_a_bit_per_weight_that_is_hashed_and_checked() -> None:
    base, zeros = base_of(GRIDS[0], MASKS["2:4"])
    assert base.mask is not None and base.mask.dtype == torch.int16
    assert torch.equal(base.locked, zeros) and base.mask.shape == (N, 32)  # 160 inputs in a superblock of 512
    free = base.dequantize() == 0
    assert (free & ~zeros).any(), "others round to zero too, and are free"
    assert base.masked(zeros | free).digest() != base.digest()
    with pytest.raises(ValueError, match="weights that it calls zero are not"):
        base.masked(~free)
    native, layer = Native(), LayerSpec.of(base)
    tensors = native.pack(base)
    assert native.unpack(tensors, layer).digest() == base.digest()
    with pytest.raises(ValueError, match="weights that it calls zero are not"):
        native.unpack(tensors | {"mask": torch.full_like(base.mask, -1)}, layer)
    assert base.rows(3, 9).digest() == base.chosen(torch.arange(3, 9)).digest()
    assert torch.equal(base.rows(3, 9).locked, zeros[3:9])
    assert base.without_residual().grid == IntGrid(bits=2, group_size=32, residual_bits=0)
    assert "mask" not in base.without_residual().grid.to_json() and base.grid.to_json()["mask"] is True
