"""Every gradient of every method against float64 autograd of the paper's equation: relative error below 1e-5,
one tolerance.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from lowbit_ft.adapters import ADAPTERS, AdapterConfig
from lowbit_ft.grid import BinaryGrid, BinaryWeight, IntGrid, PackedWeight
from tests import reference
from tests.adapters.common import K, N, base_of, trained
from tests.kernels.common import error
from tests.kernels.test_estimates import mean_over_draws

TOLERANCE = 1e-5
pytestmark = pytest.mark.usefixtures("poison")


def configs() -> Iterator[AdapterConfig]:
    """Every integer method with the options that change its gradient."""
    for order in ("round_then_clip", "clip_then_round"):
        yield ADAPTERS["lr_qat"](rank=5, alpha=3.0, clip=order)
        yield ADAPTERS["dl_qat"](rank=5, alpha=3.0, clip=order)
        for offset in ("auto", "none", "integer", "float"):
            yield ADAPTERS["l4q"](rank=5, alpha=3.0, clip=order, offset=offset)
    yield ADAPTERS["lota"](rank=5)
    yield ADAPTERS["lota"](rank=5, threshold=0.5, offset="float")
    yield ADAPTERS["scale"]()
    yield ADAPTERS["full_qat"]()
    yield ADAPTERS["ef_qat"](share=0.4, scale_grad_tokens=1.0)
    yield ADAPTERS["lora"](rank=5, alpha=3.0)


def cases() -> Iterator[tuple[AdapterConfig, IntGrid]]:
    grids = itertools.product((2, 3, 4, 8), (32, -1), (True, False), (0, 1, 4))
    for bits, group_size, symmetric, residual_bits in (*grids, (6, 32, False, 4)):
        grid = IntGrid(bits=bits, group_size=group_size, symmetric=symmetric, residual_bits=residual_bits)
        for config in configs():
            if config.reject(grid) is None:
                yield config, grid


def label(value: object) -> str:
    if isinstance(value, AdapterConfig):
        options = value.model_dump(exclude={"method", "rank", "alpha"}, exclude_defaults=True)
        return "-".join([value.method, *map(str, options.values())])
    return f"{value} f{value.residual_bits}" if isinstance(value, IntGrid) else str(value)


def test_every_method_has_a_gradient_case():
    assert {config.method for config, _ in cases()} | {"alpha_tuning"} == set(ADAPTERS)


def gradients(adapter, base, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    adapter(x, base).backward(dy)
    assert x.grad is not None
    grads = {name: p.grad for name, p in adapter.named_parameters() if p.requires_grad}
    assert all(g is not None for g in grads.values()), f"no gradient for some of {list(grads)}"
    return {"x": x.grad, **grads}


def reference_gradients(
    adapter, base: PackedWeight, x: Tensor, dy: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients and the weight [N, K], all float64."""
    config, dense = adapter.config, reference.Base.of(base)
    x = x.double().requires_grad_()
    p = {name: t.detach().double().requires_grad_() for name, t in adapter.named_parameters()}
    p |= dict(adapter.named_buffers())
    if config.method == "lora":
        w0 = dense.wide(dense.s0) * (dense.code - dense.wide(dense.z0))
        gain = config.alpha / config.rank
        weight = w0 + gain * (p["B"] @ p["A"])
        y = x @ w0.t() + gain * ((x @ p["A"].t()) @ p["B"].t())
    else:
        gain = config.gain if "A" in p else 1.0
        offset = getattr(config, "offset", "")
        if offset == "auto":
            offset = "none" if base.grid.symmetric else "integer"
        weight = reference.weight_of(
            dense, config.method, p, gain=gain, order=getattr(config, "clip", ""), offset=offset
        )
        y = x @ weight.t()
    y.backward(dy.double())
    grads = {"x": x.grad, **{name: t.grad for name, t in p.items() if t.requires_grad}}
    # What cancels exactly on paper leaves 1e-15 here: L4Q's offset feels clipped weights only, and early
    # there may be none.
    grads = {name: torch.zeros_like(t) if t.abs().max() < 1e-12 else t for name, t in grads.items()}
    return grads, weight.detach()


def draw(config: AdapterConfig, grid: IntGrid, size: float):
    """Base, adapter, x, dy, reference gradients, such that fp32 and float64 round every weight alike.

    A value within fp32 error of a rounding tie (some 1e-5 grid steps at 8 bit: one weight in a hundred
    thousand) may go either way; both ways are right and their gradients differ. Such draws are drawn again,
    after showing that it was only that.
    """
    for seed in range(8):
        torch.manual_seed(seed)
        base = base_of(grid, (N if config.method != "ef_qat" else 3 * N, K))
        assert isinstance(base, PackedWeight)
        adapter = trained(config, base, size=size)
        x, dy = torch.randn(7, base.shape[1]), torch.randn(7, base.shape[0])
        want, weight = reference_gradients(adapter, base, x, dy)
        if not config.exact_merge:
            return base, adapter, x, dy, want
        differs = (adapter.merge(base).dequantize() - weight).abs() > 1e-4 * weight.abs().max()
        if not differs.any():
            return base, adapter, x, dy, want
        assert differs.sum() <= 3, "fp32 and float64 disagree on more than ties"
    raise AssertionError("eight draws with a tie: this is no coincidence")


# Early in training nothing is clipped and LSQ's q - v is a small difference of large numbers; late, clips
# dominate.
@pytest.mark.parametrize("size", [0.02, 1.0], ids=["early", "late"])
@pytest.mark.parametrize(("config", "grid"), list(cases()), ids=label)
def test_gradients_of_integer_methods(config: AdapterConfig, grid: IntGrid, size: float):
    base, adapter, x, dy, want = draw(config, grid, size)
    got = gradients(adapter, base, x, dy)
    assert got.keys() == want.keys()
    errors = {name: error(got[name], want[name]) for name in want}
    zero = [name for name, t in want.items() if not t.any() and (size == 1.0 or name != "offset")]
    assert all(not got[name].any() for name, t in want.items() if not t.any())
    assert not zero, f"a gradient that is zero everywhere proves nothing: {zero}"
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("planes", ["first", "all"])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("divide", [False, True])
def test_gradients_of_alpha_tuning(bits: int, group_size: int, planes: str, divide: bool):
    base = base_of(BinaryGrid(bits=bits, group_size=group_size))
    assert isinstance(base, BinaryWeight)
    adapter = trained(ADAPTERS["alpha_tuning"](planes=planes, divide_gradient_by_group=divide), base)
    k = base.shape[1]
    x, dy = torch.randn(7, k), torch.randn(7, base.shape[0])
    got = gradients(adapter, base, x, dy)

    wide_x = x.double().requires_grad_()
    t = adapter.plane_scale.detach().double().requires_grad_()
    alpha0 = base.scale.double()
    live = reference.ste_cast(alpha0[: len(t)] * torch.exp(t), torch.bfloat16)
    weight = reference.binary_weight(base.planes, torch.cat([live, alpha0[len(t) :]]), None, k, group_size)
    (wide_x @ weight.t()).backward(dy.double())
    divisor = (k if group_size == -1 else group_size) if divide else 1  # the paper's 1/g_L
    errors = {"x": error(got["x"], wide_x.grad), "plane_scale": error(got["plane_scale"], t.grad / divisor)}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("method", ["lr_qat", "dl_qat", "l4q", "scale", "full_qat"])
def test_lsq_gradient_scaling_divides_scale_gradients_only(method: str):
    base = base_of(IntGrid(bits=4, group_size=64, symmetric=False))
    got = {}
    for scaled in (False, True):
        torch.manual_seed(1)
        adapter = trained(ADAPTERS[method](lsq_gradient_scaling=scaled), base)
        got[scaled] = gradients(adapter, base, torch.randn(7, base.shape[1]), torch.randn(7, base.shape[0]))
    factor = (64 * 7) ** -0.5  # LSQ: 1 / sqrt(g Qp), Qp = 2^3 - 1
    for name, plain in got[False].items():
        wanted = plain if name in ("x", "A", "B", "delta") else plain * factor
        torch.testing.assert_close(got[True][name], wanted, rtol=1e-6, atol=0)


def test_batches_of_any_rank_give_the_same_gradients():
    base = base_of(IntGrid(bits=3, group_size=32))
    adapter = trained(ADAPTERS["l4q"](), base)
    x, dy = torch.randn(6, base.shape[1]), torch.randn(6, base.shape[0])
    flat = gradients(adapter, base, x, dy)
    adapter.zero_grad()
    cube = gradients(adapter, base, x.view(2, 3, -1), dy.view(2, 3, -1))
    for name in ("A", "B", "log_scale"):
        torch.testing.assert_close(cube[name], flat[name], rtol=0, atol=0)
    torch.testing.assert_close(cube["x"].view(6, -1), flat["x"], rtol=0, atol=0)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("method", ["lr_qat", "dl_qat", "l4q", "scale"])
def test_the_mean_of_cheaper_gradients_is_the_exact_one(
    method: str, group_size: int, monkeypatch: pytest.MonkeyPatch
):
    """Over all draws, for every trained tensor of every method: through the adapters, on an asymmetric 2-bit
    grid.
    """
    base = base_of(IntGrid(bits=2, group_size=group_size, symmetric=False))
    cheap = {"scale_grad_tokens": 0.3} | (
        {} if method == "scale" else {"rank": 5, "low_rank_gradient": "corrected"}
    )
    torch.manual_seed(1)
    adapter = trained(ADAPTERS[method](**{k: v for k, v in cheap.items() if k == "rank"}), base)
    other = ADAPTERS[method](**cheap).build(base)
    other.load_state_dict(adapter.state_dict())
    x, dy = torch.randn(7, base.shape[1]), torch.randn(7, base.shape[0])
    want = gradients(adapter, base, x, dy)

    def run() -> dict[str, Tensor]:
        other.zero_grad()
        return gradients(other, base, x, dy)

    mean, draws = mean_over_draws(run, x, dy, 0.3, monkeypatch)
    assert torch.equal(draws[0]["x"], want["x"])
    errors = {name: error(mean[name], exact.double()) for name, exact in want.items()}
    assert max(errors.values()) < TOLERANCE, errors
    scale = "magnitude" if method == "dl_qat" else "log_scale"
    varies = any(not torch.equal(d[scale], draws[0][scale]) for d in draws)
    assert varies == (group_size == 32 or method == "l4q")  # one frozen scale per row has an identity instead


def test_sampled_scales_beside_an_exact_low_rank_gradient_are_refused():
    with pytest.raises(ValidationError, match="third GEMM is of all tokens.*low_rank_gradient: factorised"):
        ADAPTERS["lr_qat"](scale_grad_tokens=0.5)
    for share in (0, 1.1):
        with pytest.raises(ValidationError, match="scale_grad_tokens"):
            ADAPTERS["scale"](scale_grad_tokens=share)
