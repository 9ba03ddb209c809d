"""What each method promises beyond its gradient: its start, its identities with other
methods, its options.
"""

import itertools
import math
from dataclasses import replace

import lowbit_kernels as kernels
import pytest
import torch
from pydantic import ValidationError

from lowbit_ft.adapters import ADAPTERS, SCALE_PARAMETERS, AdapterConfig
from lowbit_ft.grid import BinaryGrid, IntGrid, PackedWeight
from tests import reference
from tests.adapters.common import LOW_RANK, base_of, packed, trained
from tests.adapters.test_law import VARIANTS, cases

pytestmark = pytest.mark.usefixtures("poison")
INT_GRIDS = [
    IntGrid(bits=b, group_size=g, symmetric=s, residual_bits=f)
    for b, g, s, f in itertools.product((2, 3, 4, 8), (32, -1), (True, False), (0, 1, 2, 4))
] + [IntGrid(bits=6, group_size=32, symmetric=s, residual_bits=f) for s, f in ((True, 0), (False, 4))]


def starts() -> list[tuple[AdapterConfig, IntGrid | BinaryGrid]]:
    out: list[tuple[AdapterConfig, IntGrid | BinaryGrid]] = []
    for method, config in ADAPTERS.items():
        every = (
            INT_GRIDS
            if config.grid_name == "integer"
            else [BinaryGrid(bits=b, group_size=32) for b in (1, 2, 3, 4)]
        )
        for options, grid in itertools.product([{}, *VARIANTS.get(method, []), {"init": "svd"}], every):
            if options.get("init") and method not in LOW_RANK:
                continue
            made = config(**options)
            if made.reject(grid) is None:
                out.append((made, grid))
    return out


@pytest.mark.parametrize(("config", "grid"), starts(), ids=str)
def test_step_0_is_the_plain_dequantization(config: AdapterConfig, grid: IntGrid | BinaryGrid):
    """Every method, every residual, symmetric or not: a fresh adapter changes no code and no scale."""
    base = base_of(grid)
    adapter = config.build(base)
    assert torch.equal(adapter(torch.eye(base.shape[1]), base), base.dequantize().t())
    if config.exact_merge:
        merged = adapter.merge(base)
        assert torch.equal(merged.unpack_codes(), base.unpack_codes())
        assert torch.equal(merged.dequantize(), base.dequantize())


@pytest.mark.parametrize("method", ADAPTERS)
def test_scale_parameters_are_named_as_such(method: str):
    config = ADAPTERS[method]
    base = base_of(BinaryGrid() if config.grid_name == "binary" else IntGrid(symmetric=False))
    names = {name.rpartition(".")[2] for name, _ in config().build(base).named_parameters()}
    assert names - SCALE_PARAMETERS <= {"A", "B", "delta"}
    assert bool(names & SCALE_PARAMETERS) == config().trains_scales == (method not in ("lora", "lota"))


@pytest.mark.parametrize(
    ("symmetric", "f", "group_size"), list(itertools.product((True, False), (0, 4), (32, -1)))
)
def test_dl_qat_is_lr_qat_in_units_of_the_weight(symmetric: bool, f: int, group_size: int):
    """D_grid = D / s0: with one group size per row and a scale that is a power of two the factor moves into B
    exactly.
    """
    base = packed(IntGrid(bits=3, group_size=group_size, symmetric=symmetric, residual_bits=f))
    row_scale = 2.0 ** torch.randint(-3, 0, (1, base.shape[0])).float()
    base = replace(base, scale=row_scale.expand_as(base.scale).bfloat16().contiguous())
    dl = trained(ADAPTERS["dl_qat"](rank=4, alpha=8.0), base)
    lr = ADAPTERS["lr_qat"](rank=4, alpha=8.0).build(base)
    with torch.no_grad():
        lr.A.copy_(dl.A)
        lr.B.copy_(dl.B / row_scale.t())
        lr.log_scale.copy_(torch.log(dl.magnitude))
    x, dy = torch.randn(5, base.shape[1]), torch.randn(5, base.shape[0])
    y_dl, y_lr = dl(x, base), lr(x, base)
    assert torch.equal(y_dl, y_lr)
    y_dl.backward(dy)
    y_lr.backward(dy)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(dl.A.grad, lr.A.grad, **close)
    torch.testing.assert_close(
        dl.B.grad, lr.B.grad / row_scale.t(), **close
    )  # chain rule of B_lr = B_dl / s0
    torch.testing.assert_close(
        dl.magnitude.grad * dl.magnitude, lr.log_scale.grad, **close
    )  # and of t = log m


@pytest.mark.parametrize("grid", [g for g in INT_GRIDS if g.residual_bits == 0], ids=str)
def test_scale_is_alpha_tuning_with_tied_planes(grid: IntGrid):
    """PEQA == alpha_k = S 2^(k-1) over the bits of the code, with the offset tied too: same output, same
    gradient.
    """
    base = packed(grid)
    adapter = trained(ADAPTERS["scale"](), base)
    x, dy = torch.randn(5, base.shape[1]), torch.randn(5, base.shape[0])
    y = adapter(x, base)
    y.backward(dy)

    b, zero = grid.bits, float(1 << (grid.bits - 1)) if base.zero is None else base.zero.float()
    planes = torch.stack([kernels.pack((base.unpack_codes() >> k) & 1, 1) for k in range(b)])
    t = adapter.log_scale.detach().clone().requires_grad_()
    s = base.scale.float() * torch.exp(t)
    s = s + (s.bfloat16().float() - s).detach()
    alpha = torch.stack([s * 2.0 ** (k - 1) for k in range(b)])
    tied = kernels.binary_matmul(x, planes, alpha, s * ((2**b - 1) / 2 - zero), grid.group_size)
    tied.backward(dy)
    torch.testing.assert_close(tied, y, rtol=1e-5, atol=1e-5)
    assert (t.grad - adapter.log_scale.grad).norm() < 1e-4 * t.grad.norm()


@pytest.mark.parametrize("method", LOW_RANK)
def test_a_zero_b_leaves_only_b_to_move_the_codes(method: str):
    """With B = 0 the first gradient goes to B (and the scales), none to A: LoRA's start."""
    base = packed(IntGrid(bits=4, group_size=32))
    adapter = ADAPTERS[method]().build(base)
    adapter(torch.randn(5, 200), base).square().sum().backward()
    assert adapter.B.grad.abs().max() > 0 and not adapter.A.grad.any()


@pytest.mark.parametrize("method", [m for m in ADAPTERS if m != "lora"])
def test_methods_refuse_the_other_grid(method: str):
    config = ADAPTERS[method]()
    other = IntGrid() if config.grid_name == "binary" else BinaryGrid()
    assert f"set quant.grid: {config.grid_name}" in str(config.reject(other))


@pytest.mark.parametrize("method", [m for m, config in ADAPTERS.items() if config().trains_scales])
def test_scales_move_under_a_small_learning_rate(method: str):
    """The bf16 stall: Adam at 1e-5 must move the fp32 master, and after enough steps the bf16 scale that
    ships.
    """
    config = ADAPTERS[method]
    base = base_of(BinaryGrid() if config.grid_name == "binary" else IntGrid(bits=4, group_size=32), (16, 64))
    adapter = config().build(base)
    scales = [p for n, p in adapter.named_parameters() if n.rpartition(".")[2] in SCALE_PARAMETERS]
    before, shipped = [p.detach().clone() for p in scales], adapter.merge(base).scale
    optimizer = torch.optim.AdamW(scales, lr=1e-5, weight_decay=0.0)
    x, dy = torch.randn(8, 64), torch.randn(8, 16)
    for _ in range(450):
        optimizer.zero_grad()
        adapter(x, base).backward(dy)
        optimizer.step()
    for p, was in zip(scales, before, strict=True):
        assert p.dtype == torch.float32 and ((p - was).abs() > 3e-3).float().mean() > 0.9
    assert (adapter.merge(base).scale != shipped).float().mean() > 0.5


@pytest.mark.parametrize("method", LOW_RANK)
def test_train_scale_false_trains_the_low_rank_part_only(method: str):
    base = packed(IntGrid(symmetric=False))
    adapter = ADAPTERS[method](train_scale=False).build(base)
    assert {n for n, p in adapter.named_parameters() if p.requires_grad} == {"A", "B"}
    adapter(torch.randn(3, 200), base).sum().backward()
    assert adapter.B.grad is not None


@pytest.mark.parametrize("method", LOW_RANK)
def test_svd_starts_from_the_rounding_errors_row_space(method: str):
    base = packed(IntGrid(bits=3, group_size=-1, residual_bits=4), (24, 64))
    adapter = ADAPTERS[method](rank=4, init="svd").build(base)
    dense = reference.Base.of(base)
    error = dense.rho if method == "lr_qat" else dense.rho * dense.wide(dense.s0)
    want = torch.linalg.svd(error).Vh[:4]
    overlap = torch.linalg.svdvals(adapter.A.detach().double() @ want.t())
    torch.testing.assert_close(overlap, torch.ones(4).double(), rtol=1e-4, atol=1e-4)
    assert not adapter.B.any()


@pytest.mark.parametrize("method", ["lr_qat", "dl_qat"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_loftq_starts_at_the_best_low_rank_fit_of_the_rounding_error(method: str, symmetric: bool):
    grid = IntGrid(bits=3, group_size=32, symmetric=symmetric, residual_bits=0)
    weight = torch.randn(24, 64) + 0.3
    from lowbit_ft.grid.calibrate import CALIBRATORS, Stats

    base = CALIBRATORS["absmax" if symmetric else "minmax"].run(weight, grid, Stats())
    assert isinstance(base, PackedWeight)
    config = ADAPTERS[method](rank=6, alpha=3.0, init="loftq")
    assert config.wants_weight
    adapter = config.build(base, weight)
    scale = reference.columns(base.scale, 64, 32)
    error = ((weight.double() - base.dequantize().double()) / scale).clamp(-0.5, 0.5)
    error = error if method == "lr_qat" else error * scale
    product = 0.5 * adapter.B.detach().double() @ adapter.A.detach().double()
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    torch.testing.assert_close(product, u[:, :6] * s[:6] @ v[:6], rtol=1e-4, atol=1e-4)
    full = config.model_copy(update={"rank": 64}).build(
        base, weight
    )  # rank above both sides: padded with zeros
    product = 3.0 / 64 * full.B.detach().double() @ full.A.detach().double()
    torch.testing.assert_close(product, error, rtol=1e-4, atol=1e-4)


def test_starts_refuse_a_base_they_cannot_read():
    for method in ("lr_qat", "dl_qat"):
        assert "residual_bits: 0" in str(ADAPTERS[method](init="loftq").reject(IntGrid(residual_bits=4)))
        assert "residual_bits: 4" in str(ADAPTERS[method](init="svd").reject(IntGrid(residual_bits=0)))


@pytest.mark.parametrize("method", LOW_RANK)
def test_clip_orders_share_the_codes_and_differ_in_the_gradient(method: str):
    base = packed(IntGrid(bits=2, group_size=32))
    grads, codes = [], []
    for order in ("round_then_clip", "clip_then_round"):
        torch.manual_seed(5)
        adapter = trained(ADAPTERS[method](clip=order, rank=4), base)
        adapter(torch.randn(5, 200), base).square().sum().backward()
        grads.append(adapter.B.grad)
        codes.append(adapter.merge(base).unpack_codes())
    assert torch.equal(*codes)
    assert not torch.allclose(*grads, rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lr_qat", {"rank": 0}),
        ("lr_qat", {"alpha": 0}),
        ("lr_qat", {"clip": "never"}),
        ("lr_qat", {"ranks": 4}),
        ("l4q", {"warmup_steps": -1}),
        ("l4q", {"offset": "maybe"}),
        ("alpha_tuning", {"planes": "second"}),
        ("scale", {"train_scale": False}),
        ("scale", {"rank": 4}),
        ("lora", {"init": "svd"}),
    ],
)
def test_bad_options_are_refused(method: str, options: dict):
    with pytest.raises(ValidationError, match=next(iter(options))):
        ADAPTERS[method](**options)


def test_lora_merge_says_what_it_lost():
    base = packed(IntGrid(bits=3, group_size=32))
    adapter = ADAPTERS["lora"](rank=4).build(base)
    with torch.no_grad():
        adapter.B.normal_(0, 0.01)
    wanted = base.dequantize() + 4 * (adapter.B @ adapter.A).detach()
    with pytest.warns(UserWarning, match="rounds again"):
        merged = adapter.merge(base)
    lost = ((merged.dequantize() - wanted).norm() / (wanted - base.dequantize()).norm()).item()
    assert math.isclose(adapter.rounding_loss, lost, rel_tol=1e-5)
    assert merged.grid == ADAPTERS["lora"]().shipped(base.grid)
    assert lost > 1, "if the merge lost less than the update, the methods next to it would have no reason"


@pytest.mark.parametrize("method", LOW_RANK)
def test_codes_do_not_depend_on_the_number_of_threads(method: str):
    base = packed(IntGrid(bits=4, group_size=64), (384, 512))
    adapter = trained(ADAPTERS[method](rank=32), base)
    threads, digests = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            digests.append(adapter.merge(base).digest())
    finally:
        torch.set_num_threads(threads)
    assert digests[0] == digests[1]


def test_the_law_table_is_the_method_table():
    assert {case.config.method for case in cases()} == {m for m, c in ADAPTERS.items() if c.exact_merge}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lr_qat_counts_steps_of_the_scale_without_its_sign(bits: int) -> None:
    """D of one sign moves every weight one way, whatever the signs of the scales: what is low-rank in the
    product is low-rank in the weight."""
    torch.manual_seed(0)
    grid = IntGrid(bits=bits, group_size=32, symmetric=True)
    base = packed(grid, (24, 64))
    assert (base.scale < 0).any() and (base.scale > 0).any()
    config = ADAPTERS["lr_qat"].model_validate({"method": "lr_qat", "rank": 2, "alpha": 2.0})
    adapter = config.build(base)
    with torch.no_grad():
        adapter.A.fill_(1.0)
        adapter.B.copy_(torch.where(torch.arange(24) % 2 == 0, 0.5, -0.5)[:, None].expand(-1, 2))
    moved = adapter.merge(base).dequantize() - base.dequantize()
    signs = torch.where(torch.arange(24) % 2 == 0, 1.0, -1.0)[:, None]
    assert (moved * signs >= 0).all() and (moved != 0).float().mean() > 0.2
