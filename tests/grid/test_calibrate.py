"""Calibrators: every one on every grid, and the orderings that make them worth having."""

import itertools

import lowbit_kernels as kernels
import pytest
import torch
from torch import Tensor

from lowbit_ft.grid import BinaryGrid, Grid, IntGrid, PackedWeight
from lowbit_ft.grid.calibrate import CALIBRATORS, Curvature, Stats, ranges
from lowbit_ft.grid.calibrate.curvature import PANEL, SUM_ROWS, factor_
from lowbit_ft.grid.estimators import SMALLEST_SCALE
from tests import reference

pytestmark = pytest.mark.usefixtures("poison")
SHAPE = (9, 200)
INT_GRIDS = [
    IntGrid(bits=b, group_size=g, symmetric=s)
    for bits, groups in (((2, 3, 4, 8), (32, 64, 128, 256, -1)), ((6,), (64, -1)))
    for b, g, s in itertools.product(bits, groups, (True, False))
]
BINARY_GRIDS = [
    BinaryGrid(bits=b, group_size=g) for b, g in itertools.product((1, 2, 3, 4), (32, 64, 128, 256, -1))
]
PAIRS = [
    (name, grid)
    for name, c in CALIBRATORS.items()
    for grid in [*INT_GRIDS, *BINARY_GRIDS]
    if c.reject(grid) is None
]


def weights(shape: tuple[int, int] = SHAPE) -> Tensor:
    """Heavy-tailed, as rows of a trained linear are, and not centred."""
    return torch.distributions.StudentT(4.0).sample(shape) * 0.05 + 0.01


def weights_for(name: str, grid: Grid) -> Tensor:
    """`weights`; for a calibrator of weights that are on the grid already: of it, with scales that are powers
    of two, so that they are the same numbers in half precision."""
    if not CALIBRATORS[name].exact:
        return weights()
    assert isinstance(grid, IntGrid)
    base = run("absmax" if grid.symmetric else "minmax", weights(), grid)
    scale = 2.0 ** base.scale.float().log2().round()
    return PackedWeight.quantize(weights(), scale, base.zero, grid).dequantize()


def correlated_hessian(k: int, tokens: int = 400) -> Tensor:
    """sum x x^T of inputs that live mostly in a few directions, with a few loud channels."""
    x = torch.randn(tokens, 24) @ torch.randn(24, k) + 0.1 * torch.randn(tokens, k)
    x[:, ::17] *= 5
    return x.t() @ x


def run(name: str, weight: Tensor, grid: Grid, **stats):
    hessian = stats.pop("hessian", torch.eye(weight.shape[1]) if CALIBRATORS[name].needs_text else None)
    curvature = None if hessian is None else Curvature(hessian.clone())
    return CALIBRATORS[name].run(weight, grid, Stats(curvature=curvature, **stats))


def group_error(weight: Tensor, packed, p: float = 2.0) -> Tensor:
    """sum |w - Q(w)|^p per group, float64 [G, N]."""
    error = (weight.double() - packed.dequantize().double()).abs() ** p
    g = weight.shape[1] if packed.grid.group_size == -1 else packed.grid.group_size
    return torch.stack([part.sum(1) for part in error.split(g, dim=1)])


def test_every_calibrator_serves_a_grid():
    assert {name for name, _ in PAIRS} == set(CALIBRATORS) and len(CALIBRATORS) >= 6
    for grid in [*INT_GRIDS, *BINARY_GRIDS]:
        assert any(c.reject(grid) is None for c in CALIBRATORS.values()), f"nothing can start {grid}"


@pytest.mark.parametrize(("name", "grid"), PAIRS, ids=str)
def test_every_calibrator_on_every_grid(name: str, grid: Grid):
    weight = weights_for(name, grid)
    packed = run(name, weight, grid)
    groups = kernels.group_count(SHAPE[1], grid.group_size)
    assert packed.grid == grid and packed.shape == SHAPE
    assert packed.scale.shape[-2:] == (groups, SHAPE[0]) and packed.scale.dtype == torch.bfloat16
    assert packed.scale.float().isfinite().all() and (packed.scale.float().abs() >= SMALLEST_SCALE).all()
    dense = packed.dequantize()
    assert dense.isfinite().all()
    # Some structure is kept: less error than throwing the weight away.
    assert (dense - weight).norm() < weight.norm()
    if isinstance(packed, PackedWeight):
        assert (packed.zero is None) == grid.symmetric and packed.residual is not None
        assert packed.unpack_codes().max().item() < 1 << grid.bits
    # A round trip through named tensors keeps every bit.
    again = type(packed).from_tensors(packed.to_tensors(), packed.shape, grid)
    assert again.digest() == packed.digest()


def test_a_calibrator_refuses_the_wrong_grid_and_says_what_fits():
    assert "greedy, alternating" in str(CALIBRATORS["mse"].reject(BinaryGrid()))
    assert "mse" in str(CALIBRATORS["greedy"].reject(IntGrid()))
    assert "symmetric: true" in str(CALIBRATORS["absmax"].reject(IntGrid(symmetric=False)))
    assert "symmetric: false" in str(CALIBRATORS["minmax"].reject(IntGrid()))
    assert "needs quant.bits: 1 or 2; at 3 use one of greedy, alternating" in str(
        CALIBRATORS["mean"].reject(BinaryGrid(bits=3))
    )
    assert "works on binary grids" in str(CALIBRATORS["mean"].reject(IntGrid(bits=2)))


@pytest.mark.parametrize("p", [2.0, 2.4, 4.0])
@pytest.mark.parametrize("grid", INT_GRIDS, ids=str)
def test_mse_is_never_worse_than_the_full_range(grid: IntGrid, p: float):
    weight = weights()
    full = group_error(weight, run("absmax" if grid.symmetric else "minmax", weight, grid), p)
    searched = group_error(weight, run("mse", weight, grid, p=p), p)
    assert (searched <= full * (1 + 1e-4)).all()
    if grid.bits < 8:
        assert searched.sum() < 0.999 * full.sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "grid",
    [IntGrid(bits=b, symmetric=s, group_size=32) for b in (2, 3, 4, 6, 8) for s in (True, False)],
    ids=str,
)
def test_groups_left_alone_early_have_the_result_of_the_whole_search(
    grid: IntGrid, weighted: bool, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(1)
    groups = torch.randn(7, 33, 32) * torch.rand(7, 33, 1)
    groups[0] *= torch.where(torch.rand(33, 32) < 0.05, 20.0, 1.0)  # outliers: what clipping is for
    groups[1, :9], groups[1, 9:20] = 0.0, groups[1, 9:20].abs() + 1
    weight = torch.rand(32) if weighted else None
    looked: list[int] = []
    counted = ranges.rounding_error
    monkeypatch.setattr(
        ranges, "rounding_error", lambda g, *rest: (looked.append(len(g)), counted(g, *rest))[1]
    )
    found = []
    for every, elements in ((ranges.PRUNE_EVERY, 5 * 32), (10**9, 1 << 30)):
        monkeypatch.setattr(ranges, "PRUNE_EVERY", every)
        monkeypatch.setattr(ranges, "CPU_ELEMENTS", elements)
        looked.clear()
        scale, zero = ranges.search(groups, grid, 2.4, weight)
        found.append((scale, zero, sum(looked)))
    (scale, zero, few), (expected, expected_zero, all_) = found
    assert scale.shape == (7, 33) and torch.equal(scale, expected)
    assert (zero is None) == grid.symmetric and (zero is None or torch.equal(zero, expected_zero))
    assert few < (0.95 if grid.bits == 2 else 0.8) * all_


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_a_symmetric_group_takes_the_sign_that_costs_less(bits: int) -> None:
    """Codes go one step further down than up. In float64: the error is the lesser one over ratios of both
    signs; a weight and its negative have scales of opposite sign and the same error; 8 bits stay positive."""
    torch.manual_seed(2)
    grid, groups = IntGrid(bits=bits, group_size=32, symmetric=True), torch.randn(40, 32) ** 3
    scale, _ = ranges.search(groups, grid, 2.0)
    half, wide = grid.levels // 2, groups.double()

    def errors(s: torch.Tensor) -> torch.Tensor:
        q = (wide / s[:, None]).round().clamp(-half, half - 1) * s[:, None]
        return (q - wide).square().sum(1)

    full = ranges.full_range(groups, grid)[0].double()
    signs = (1, -1) if bits <= ranges.SIGNED_BITS else (1,)
    tried = torch.stack(
        [errors((sign * ratio * full).bfloat16().double()) for sign in signs for ratio in ranges.RATIOS]
    )
    assert torch.allclose(errors(scale.double()), tried.amin(0), rtol=1e-3)
    assert (scale < 0).any() == (bits <= ranges.SIGNED_BITS)
    if bits <= ranges.SIGNED_BITS:
        assert (scale > 0).any()
        other, _ = ranges.search(-groups, grid, 2.0)
        assert torch.allclose(errors(-other.double()), errors(scale.double()))


@pytest.mark.parametrize("symmetric", [True, False])
def test_full_range_covers_every_weight(symmetric: bool):
    """absmax and minmax clip nothing by more than the half step that bf16 scales cost."""
    weight = weights()
    packed = run(
        "absmax" if symmetric else "minmax", weight, IntGrid(bits=4, group_size=32, symmetric=symmetric)
    )
    scale = reference.columns(packed.scale, SHAPE[1], 32)
    assert ((packed.dequantize() - weight).abs() <= scale * 0.56).all()


@pytest.mark.parametrize("grid", [g for g in INT_GRIDS if g.group_size in (32, 256, -1)], ids=str)
def test_gptq_is_better_where_inputs_are_correlated(grid: IntGrid):
    """tr(E H E^T) with E = W - Q, the squared output error over the calibration inputs, is what falls."""
    weight, hessian = weights(), correlated_hessian(SHAPE[1])

    def output_error(packed) -> float:
        e = (weight - packed.dequantize()).double()
        return ((e @ hessian.double()) * e).sum().item()

    assert output_error(run("gptq", weight, grid, hessian=hessian)) < 0.8 * output_error(
        run("mse", weight, grid, p=2.0)
    )


@pytest.mark.parametrize("options", [{}, {"static_groups": True}, {"act_order": True}], ids=str)
@pytest.mark.parametrize("grid", [g for g in INT_GRIDS if g.bits < 8], ids=str)
def test_gptq_with_uncorrelated_inputs_is_plain_rounding(grid: IntGrid, options: dict[str, bool]):
    """H = I: nothing to make up for, so codes and scales are those of the p = 2 search in coarse steps."""
    weight = weights()
    scale, zero = ranges.search(kernels.layout.grouped(weight, grid.group_size), grid, 2.0)
    errors = []
    for ratios in (ranges.RATIOS, ranges.COARSE_RATIOS):
        scale, zero = ranges.search(kernels.layout.grouped(weight, grid.group_size), grid, 2.0, ratios=ratios)
        want = PackedWeight.quantize(weight, scale.t(), None if zero is None else zero.t(), grid)
        errors.append(group_error(weight, want).sum())
    assert run("gptq", weight, grid, **options).digest() == want.digest()
    most = (
        1.02 if grid.bits == 6 else 1.01
    )  # the more bits, the nearer a step of the clip is to one of a code
    assert errors[1] < most * errors[0], "steps of 0.03 cost less than 1 % of the error"


def textbook(weight: Tensor, hessian: Tensor, scale: Tensor, damping: float, order: list[int]) -> Tensor:
    """Codes [N, K] on 3 symmetric bits by the recursion on the inverse, in float64, columns in `order`:
    q_i = Q(w_i), then w_j -= (w_i - q_i) / U_ii * U_ij for all j still to come."""
    h = hessian.double()
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    u = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    w, s = weight.double()[:, order], scale[:, order]
    code = torch.empty_like(w)
    for i in range(len(order)):
        code[:, i] = (w[:, i] / s[:, i] + 4).round().clamp(0, 7)
        e = (w[:, i] - (code[:, i] - 4) * s[:, i]) / u[i, i]
        w[:, i + 1 :] -= torch.outer(e, u[i, i + 1 :])
    return code[:, torch.tensor(order).argsort()]


@pytest.mark.parametrize("order", ["own", "static", "activations"])
@pytest.mark.parametrize(("k", "group_size"), [(96, -1), (300, -1), (300, 256), (300, 32), (200, 128)])
def test_gptq_follows_the_column_equations(k: int, group_size: int, order: str):
    """Against the textbook's loop, which has an inverse and goes from the first column of its order to the
    last; ours has none, goes from the last to the first, and sums what lies outside a block at once."""
    weight, hessian = weights((40, k)), correlated_hessian(k)
    options = {"own": {}, "static": {"static_groups": True}, "activations": {"act_order": True}}[order]
    grid = IntGrid(bits=3, group_size=group_size)
    packed = run("gptq", weight, grid, hessian=hessian, damping=0.05, **options)
    columns = list(range(k))[::-1]
    if order == "activations":
        columns = hessian.diagonal().argsort(stable=True).flip(0).tolist()
    code = textbook(weight, hessian, reference.columns(packed.scale, k, group_size), 0.05, columns)
    # A near-tie may fall the other way in fp32, and every column after it in that row with it: count whole
    # rows.
    assert (packed.unpack_codes().double() == code).all(1).float().mean() > 0.85


def test_scales_of_groups_that_are_not_static_see_what_came_before():
    """The first group that is searched is the last one: its scales are those of the weights as they came; of
    the others some differ, and the output error is the smaller for it."""
    weight, hessian = weights((64, 256)), correlated_hessian(256)
    grid = IntGrid(bits=2, group_size=64, symmetric=False)
    moving, static = (run("gptq", weight, grid, hessian=hessian, static_groups=s) for s in (False, True))
    assert torch.equal(moving.scale[3], static.scale[3]) and torch.equal(moving.zero[3], static.zero[3])
    assert all(not torch.equal(moving.scale[g], static.scale[g]) for g in range(3))
    error = [
        (((weight - p.dequantize()) @ hessian) * (weight - p.dequantize())).sum() for p in (moving, static)
    ]
    assert error[0] < error[1]


@pytest.mark.parametrize("k", [1, 33, PANEL, PANEL + 1, 2 * SUM_ROWS + 77])
def test_half_a_hessian_is_summed_and_factored_in_panels(k: int):
    curvature, total = Curvature(), torch.zeros(k, k, dtype=torch.float64)
    for tokens in (700, 900, k):
        x = torch.randn(tokens, k) * torch.linspace(0.2, 3, k)
        curvature.add(x.bfloat16())
        total += x.bfloat16().double().t() @ x.bfloat16().double()
    total /= 1600 + k
    factor = curvature.factor(0.01)
    torch.testing.assert_close(factor.diagonal.double(), total.diagonal(), rtol=1e-4, atol=0)
    wanted = total + 0.01 * total.diagonal().mean() * torch.eye(k)
    lower = factor.lower.double().tril()
    assert (lower @ lower.t() - wanted).norm() < 1e-5 * wanted.norm()
    assert curvature.factor(0.01) is factor, "the weights that share it share the work"


def test_where_fp32_fails_the_factor_is_made_in_fp64(monkeypatch: pytest.MonkeyPatch):
    """H of rank one and 1e8 times its damping: fp32 has no positive pivot left. Above the diagonal H was
    kept, so fp64 starts from it."""
    from lowbit_ft.grid.calibrate import curvature as module

    k, tried = 2 * PANEL + 40, []
    x = torch.randn(1, k, dtype=torch.float64).float()
    monkeypatch.setattr(module, "factor_", lambda h: (tried.append(h.dtype), factor_(h))[1])
    factor = Curvature(x.t() @ x).factor(1e-9)
    assert tried[:2] == [torch.float32, torch.float64]
    total = (x.t() @ x).double()
    damping = 1e-9 * 10 ** (len(tried) - 2)
    wanted = total + damping * total.diagonal().mean() * torch.eye(k)
    assert (
        factor.lower.double().tril() @ factor.lower.double().tril().t() - wanted
    ).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", CALIBRATORS)
def test_half_precision_weights_are_calibrated_in_fp32(name: str):
    grid = next(grid for n, grid in PAIRS if n == name)
    weight = weights_for(name, grid).bfloat16()
    assert run(name, weight, grid).digest() == run(name, weight.float(), grid).digest()


def test_gptq_needs_text():
    with pytest.raises(ValueError, match="calibration"):
        CALIBRATORS["gptq"].run(weights(), IntGrid(), Stats())


def test_gptq_dead_inputs_are_rounded_alone_and_hurt_nobody():
    """Inputs that were never active: codes of the others as without them, their own plainly rounded.
    Activations may be tiny.
    """
    grid, k = IntGrid(bits=3, group_size=-1), 64
    weight = weights((5, 2 * k))
    live = correlated_hessian(k) * 1e-7
    hessian = torch.zeros(2 * k, 2 * k)
    hessian[::2, ::2] = live
    packed = run("gptq", weight, grid, hessian=hessian)
    plain = PackedWeight.quantize(weight, packed.scale, None, grid)
    assert torch.equal(packed.unpack_codes()[:, 1::2], plain.unpack_codes()[:, 1::2])

    def output_error(p) -> float:
        e = (weight - p.dequantize())[:, ::2].double()
        return ((e @ live.double()) * e).sum().item()

    assert output_error(packed) < 0.7 * output_error(plain)


@pytest.mark.parametrize("kind", ["rank one", "zero", "constant"])
def test_gptq_survives_a_singular_hessian(kind: str):
    k = 128
    x = torch.randn(1, k)
    hessian = {"rank one": x.t() @ x, "zero": torch.zeros(k, k), "constant": torch.ones(k, k)}[kind]
    weight = weights((5, k))
    packed = run("gptq", weight, IntGrid(bits=4, group_size=32), hessian=hessian)
    assert packed.dequantize().isfinite().all()
    assert (packed.dequantize() - weight).norm() < weight.norm()


def test_gptq_gives_up_on_a_hessian_that_is_none():
    with pytest.raises(ValueError, match="singular"):
        run(
            "gptq",
            weights((3, 32)),
            IntGrid(),
            hessian=-torch.eye(32) + 2 * torch.diag(torch.arange(32) % 2.0),
        )


@pytest.mark.parametrize(("name", "grid"), [p for p in PAIRS if p[1].group_size in (64, -1)], ids=str)
def test_constant_and_zero_groups(name: str, grid: Grid):
    """All-zero rows stay (nearly) zero, constant rows keep their value; nothing becomes NaN."""
    weight = torch.zeros(4, 128)
    weight[1] = 0.25
    weight[2] = -0.25
    weight[3, 5] = 1.0
    packed = run(name, weight, grid)
    dense = packed.dequantize()
    assert dense.isfinite().all()
    assert dense[0].abs().max() <= 4 * SMALLEST_SCALE
    step = 0.25 / (2**grid.bits - 1) if isinstance(grid, IntGrid) else 0.01
    if name == "mean" and grid.bits == 2:
        step = 0.25 / 2  # LLM-QAT's: a constant m lies between the levels m / 2 and 3 m / 2
    assert ((dense[1:3] - weight[1:3]).abs() <= 1.1 * step).all()


@pytest.mark.parametrize("grid", [g for g in INT_GRIDS if g.group_size in (64, -1)], ids=str)
def test_a_uniform_grid_is_a_binary_one(grid: IntGrid):
    """W = s (c - z) is sum_k alpha_k b_k + T with alpha_k = s 2^(k-1), b_k = 2 bit_k(c) - 1, T = s ((2^b -
    1)/2 - z), exactly.

    And back: the planes are the bits of the code."""
    weight = weights()
    packed = run("mse", weight, grid)
    assert isinstance(packed, PackedWeight)
    code, b = packed.unpack_codes(), grid.bits
    bit = torch.stack([(code >> k) & 1 for k in range(b)])
    planes = torch.stack([kernels.pack(plane, 1) for plane in bit])
    scale = packed.scale.float()
    zero = float(1 << (b - 1)) if packed.zero is None else packed.zero.float()
    alpha = torch.stack([scale * 2.0 ** (k - 1) for k in range(b)])
    offset = scale * ((2**b - 1) / 2 - zero)
    dense = kernels.binary_dequantize(planes, alpha, offset, SHAPE[1], grid.group_size, torch.float32)
    assert torch.equal(dense, packed.dequantize())
    x = torch.randn(3, SHAPE[1])
    assert torch.equal(kernels.binary_matmul(x, planes, alpha, offset, grid.group_size), packed.linear(x))
    back = sum(kernels.unpack(plane, 1, SHAPE[1]).long() << k for k, plane in enumerate(planes))
    assert torch.equal(back, code.long())
