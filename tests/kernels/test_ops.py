"""The ops against float64, in small chunks and with other numbers of threads."""

import itertools

import lowbit_kernels as kernels
import pytest
import torch
from lowbit_kernels import layout
from lowbit_kernels.codes import UNITS
from torch import Tensor

from tests import reference
from tests.kernels.common import K, N, binary_args, codes_of, dense, error, integer_args, untied

pytestmark = pytest.mark.usefixtures("poison")
GRID_CASES = list(itertools.product((2, 3, 4, 8), (32, 128, -1), UNITS, (False, True)))
GRID_CASES += [(6, 128, units, zero) for units, zero in zip(UNITS, (True, False, True), strict=True)]


def group_sums(dw: Tensor, size: int) -> Tensor:
    """dW [N, K] -> its sums over groups of inputs [G, N]."""
    return torch.stack([part.sum(1) for part in dw.split(size, dim=1)])


@pytest.mark.parametrize(("bits", "group_size", "units", "zero"), GRID_CASES)
@pytest.mark.parametrize("f", [0, 1, 2, 4])
def test_grid_codes(bits: int, group_size: int, units: str, zero: bool, f: int):
    args, value, _, _ = untied(bits=bits, group_size=group_size, units=units, zero=zero, f=f)
    want = value.round().clamp(0, 2**bits - 1).long()
    assert torch.equal(kernels.unpack(codes_of(args, K), bits, K).long(), want)
    assert value.min() < 0 and value.max() > 2**bits - 1, "no clipping: half of the op was not looked at"


@pytest.mark.parametrize(("bits", "group_size", "units", "zero"), GRID_CASES)
@pytest.mark.parametrize("clip_first", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_grid_linear_and_every_gradient(bits, group_size, units, zero, clip_first, offset):
    # On a frozen grid an offset is added outside only; the reference adds it to W and the op's value ignores
    # it too.
    args, _, weight, leaves = untied(
        bits=bits, group_size=group_size, units=units, zero=zero, clip_first=clip_first, offset=offset
    )
    x, dy = torch.randn(2, 4, K), torch.randn(2, 4, N)
    wide_x = x.double().requires_grad_()
    want = wide_x @ weight.t()
    want.backward(dy.double())

    x.requires_grad_()
    small = {name: args[name].requires_grad_() for name in leaves}
    y = kernels.grid_linear(x, **args)
    y.backward(dy)
    assert error(y, want) < 1e-5 and error(x.grad, wide_x.grad) < 1e-5
    errors = {name: error(t.grad, leaves[name].grad) for name, t in small.items()}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_grid_linear_without_a_low_rank_part(group_size: int):
    args, _, weight, leaves = untied(group_size=group_size, low_rank=False, offset=True)
    x, dy = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    wide_x = x.detach().double()
    (wide_x @ weight.t()).backward(dy.double())
    small = {name: args[name].requires_grad_() for name in leaves}
    kernels.grid_linear(x, **args).backward(dy)
    assert set(small) == {"scale", "offset"}
    assert max(error(t.grad, leaves[name].grad) for name, t in small.items()) < 1e-5
    assert torch.equal(codes_of(args, K), args["codes"])


def test_grid_gradients_without_a_low_rank_part():
    """Without a low-rank part nothing stands in its place, and the offset's gradient is made even where there
    is no offset: the sum of dW over the group.
    """
    args, _, weight, leaves = untied(low_rank=False)
    x, dy = torch.randn(5, K), torch.randn(5, N)
    (x.double() @ weight.t()).backward(dy.double())
    ds, dt, da, db = kernels.grid_gradients(x, dy, **args)
    assert ds.shape == dt.shape == args["scale"].shape and da.shape == db.shape == (0,)
    assert error(ds, leaves["scale"].grad) < 1e-5
    assert error(dt, group_sums(dy.double().t() @ x.double(), 32)) < 1e-5


def test_only_what_is_asked_for_gets_a_gradient():
    args = integer_args(offset=True)
    args["b"].requires_grad_()
    kernels.grid_linear(torch.randn(5, K), **args).sum().backward()
    assert args["b"].grad is not None and args["a"].grad is None and args["scale"].grad is None


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("clip_first", [False, True])
@pytest.mark.parametrize("f", [0, 4])
def test_a_dense_part_of_some_rows(
    group_size: int, clip_first: bool, f: int, monkeypatch: pytest.MonkeyPatch
):
    """Codes and gradients by the equations in float64, chunk by chunk too; all other rows are the base's."""
    args = integer_args(3, group_size, f, low_rank=False, clip_first=clip_first, offset=True)
    rows, delta = torch.tensor([2, 3, 7, 12]), torch.randn(4, K) * 2
    args |= {"rows": rows, "delta": delta.requires_grad_()}
    whole = torch.zeros(N, K).index_copy(0, rows, delta.detach())
    _, moved, leaves = dense({**args, "gain": 1.0, "a": torch.eye(K), "b": whole}, K)
    _, frozen, _ = dense({**args, "residual_bits": 0}, K)
    chosen = torch.zeros(N, 1, dtype=torch.bool).index_fill(0, rows, True)
    weight = torch.where(chosen, moved, frozen.detach())
    x, dy = torch.randn(5, K), torch.randn(5, N)
    (x.double() @ weight.t()).backward(dy.double())
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 3 * K)
    args["scale"].requires_grad_()
    y = kernels.grid_linear(x, **args)
    y.backward(dy)
    assert error(y.detach(), x.double() @ weight.detach().t()) < 1e-5
    assert error(delta.grad, leaves["b"].grad[rows]) < 1e-5  # pyright: ignore[reportArgumentType]
    assert error(args["scale"].grad[:, rows], leaves["scale"].grad[:, rows]) < 1e-5
    codes = codes_of(args, K)
    still = ~chosen[:, 0]
    assert torch.equal(codes[still], args["codes"][still]) and not torch.equal(
        codes[rows], args["codes"][rows]
    )


def test_a_dense_part_counts_grid_steps_and_stands_alone():
    args = integer_args()
    for wrong in ({"units": "live"}, {"units": "grid"}):
        with pytest.raises(ValueError, match="delta counts grid steps and stands alone"):
            codes_of({**args, **wrong, "delta": torch.zeros(N, K)}, K)


@pytest.mark.parametrize(("bits", "units", "zero"), list(itertools.product((2, 4), UNITS, (False, True))))
def test_masked_weights_are_zero_and_nothing_learns_from_them(
    bits: int, units: str, zero: bool, monkeypatch: pytest.MonkeyPatch
):
    """The equations in float64 times a mask: value and every gradient, in small chunks. An offset that is the
    way of a gradient, as that of l4q's zero point, learns from the other weights."""
    live = units == "live"
    args, _, weight, leaves = untied(bits=bits, units=units, zero=zero, clip_first=live)
    zeros = torch.rand(N, K) < 0.5
    if live:
        args["offset"] = torch.zeros_like(args["scale"])  # l4q's: the way of a gradient, 0 in value
        _, weight, leaves = dense(args, K)
    args["mask"] = kernels.pack(zeros.to(torch.uint8), 1)
    x, dy = torch.randn(5, K), torch.randn(5, N)
    wide_x = x.double().requires_grad_()
    want = wide_x @ weight.masked_fill(zeros, 0).t()
    want.backward(dy.double())
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 3 * K)
    small = {name: args[name].requires_grad_() for name in leaves}
    x.requires_grad_()
    y = kernels.grid_linear(x, **args)
    y.backward(dy)
    assert error(y, want) < 1e-5 and error(x.grad, wide_x.grad) < 1e-5
    errors = {name: error(t.grad, leaves[name].grad) for name, t in small.items()}
    assert max(errors.values()) < 1e-5, errors
    codes = kernels.unpack(codes_of(args, K), bits, K).float()
    points = reference.columns(args["zero"], K, 32) if zero else torch.full((N, K), 2.0 ** (bits - 1))
    assert torch.equal(codes[zeros], points[zeros].float()) and not torch.equal(codes, points.float())


@pytest.mark.parametrize("some", [False, True])
def test_a_mask_over_a_dense_part(some: bool):
    args = integer_args(3, low_rank=False)
    rows = torch.tensor([2, 3, 7, 12]) if some else torch.arange(N)
    delta, zeros = torch.randn(len(rows), K) * 2, torch.rand(N, K) < 0.5
    points = reference.columns(args["zero0"], K, 32).to(torch.uint8)
    base = torch.where(zeros, points, kernels.unpack(args["codes"], 3, K))
    args |= {"codes": kernels.pack(base, 3), "zero": args["zero0"].float()}
    whole = torch.zeros(N, K).index_copy(0, rows, delta)
    _, moved, leaves = dense({**args, "gain": 1.0, "a": torch.eye(K), "b": whole}, K)
    x, dy = torch.randn(5, K), torch.randn(5, N)
    (x.double() @ moved.masked_fill(zeros, 0).t()).backward(dy.double())
    args |= {"delta": delta.requires_grad_(), "rows": rows if some else None}
    args |= {"mask": kernels.pack(zeros.to(torch.uint8), 1), "scale": args["scale"].requires_grad_()}
    kernels.grid_linear(x, **args).backward(dy)
    assert not delta.grad[zeros[rows]].any() and error(delta.grad, leaves["b"].grad[rows]) < 1e-5  # pyright: ignore
    assert error(args["scale"].grad[:, rows], leaves["scale"].grad[:, rows]) < 1e-5
    codes = kernels.unpack(codes_of({**args, "delta": delta.detach()}, K), 3, K)
    assert torch.equal(codes[zeros], points[zeros])


def test_a_mask_is_refused_where_a_gradient_would_be_of_all_weights():
    args = integer_args() | {"mask": torch.zeros(N, 32, dtype=torch.int16)}
    with pytest.raises(ValueError, match="a mask with low_rank='factorised'"):
        kernels.grid_linear(torch.randn(2, K), **args, low_rank="factorised")
    with pytest.raises(ValueError, match="no offset on a frozen grid"):
        kernels.grid_linear(torch.randn(2, K), **{**args, "offset": torch.zeros_like(args["scale"])})


def test_unknown_units_are_refused():
    args = integer_args()
    with pytest.raises(ValueError, match="'grid', 'weight', 'live'"):
        kernels.grid_linear(torch.randn(2, K), **{**args, "units": "step"})


@pytest.mark.parametrize(("bits", "group_size"), list(itertools.product((2, 3, 4, 6, 8), (32, 128, -1))))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_matmul_and_dx(bits: int, group_size: int, dtype: torch.dtype):
    a = integer_args(bits, group_size, offset=True)
    grid = (a["codes"], a["scale"], a["zero"], a["offset"], bits)
    weight = kernels.dequantize(*grid, K, group_size, dtype).double()
    tolerance = 1e-6 if dtype == torch.float32 else 6e-3
    for shape in ((K,), (4, K), (2, 3, K)):
        x = torch.randn(shape).to(dtype).requires_grad_()
        y = kernels.packed_matmul(x, *grid, group_size)
        assert y.shape == (*shape[:-1], N) and y.dtype == dtype
        assert error(y, x.double() @ weight.t()) < tolerance
        dy = torch.randn_like(y)
        y.backward(dy)
        assert x.grad is not None and x.grad.dtype == dtype
        assert error(x.grad, dy.double() @ weight) < tolerance


def test_packed_matmul_refuses_to_lose_a_gradient():
    a = integer_args(offset=True)
    for name in ("scale", "offset"):
        grid = {n: a[n] for n in ("codes", "scale", "zero", "offset")}
        grid[name] = grid[name].clone().requires_grad_()
        with pytest.raises(ValueError, match="use grid_linear"):
            kernels.packed_matmul(torch.randn(2, K), **grid, bits=4, group_size=32)


@pytest.mark.parametrize("q", [1, 2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("offset", [False, True])
def test_binary_matmul_and_every_gradient(q: int, group_size: int, offset: bool):
    planes, alpha, shift = binary_args(q, group_size, offset)
    x, dy = torch.randn(2, 3, K), torch.randn(2, 3, N)
    wide = [x.double().requires_grad_(), alpha.double().requires_grad_()]
    wide_shift = shift.double().requires_grad_() if shift is not None else None
    weight = reference.binary_weight(planes, wide[1], wide_shift, K, group_size)
    assert (
        error(kernels.binary_dequantize(planes, alpha, shift, K, group_size, torch.float32), weight.detach())
        < 1e-6
    )
    want = wide[0] @ weight.t()
    want.backward(dy.double())

    leaves = [t.requires_grad_() for t in (x, alpha, shift) if t is not None]
    y = kernels.binary_matmul(x, planes, alpha, shift, group_size)
    y.backward(dy)
    assert error(y, want) < 1e-5
    wants = [*wide, *([wide_shift] if wide_shift is not None else [])]
    assert all(error(t.grad, w.grad) < 1e-5 for t, w in zip(leaves, wants, strict=True))


@pytest.mark.parametrize("trained", [0, 1, 3])
def test_binary_gradients_of_the_first_planes(trained: int):
    planes, _, _ = binary_args(3, 32)
    x, dy = torch.randn(5, K), torch.randn(5, N)
    da, dt = kernels.binary_gradients(x, dy, planes, 32, trained)
    every, again = kernels.binary_gradients(x, dy, planes, 32, 3)
    assert da.shape[0] == trained and torch.equal(da, every[:trained]) and torch.equal(dt, again)
    assert error(dt, group_sums(dy.double().t() @ x.double(), 32)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_round_values_and_exact_exp(dtype: torch.dtype):
    value = torch.randn(50, requires_grad=True)
    rounded, grad = kernels.round_values(value, dtype), torch.randn(50)
    assert torch.equal(rounded, value.detach().to(dtype).float())
    assert torch.equal(torch.autograd.grad(rounded, value, grad)[0], grad)
    power = kernels.exact_exp(value)
    assert torch.equal(power, value.detach().exp())
    assert torch.equal(torch.autograd.grad(power, value, grad)[0], grad * power.detach())


def test_small_chunks_give_the_same_weights(monkeypatch):
    """N in many chunks: rounding and packing are per weight, so codes without a low-rank part and dense
    weights are equal bit for bit. With one, D is a matrix product whose shape is the chunk: the BLAS may add
    in another order, so values may differ in the last bit (and a code at a tie by one); sums over N (dX, dA)
    differ in the last bits too.
    """
    weight, scale = torch.randn(N, K), torch.full((kernels.group_count(K, 32), N), 0.2)
    plain, low = (
        integer_args(low_rank=False, units="live", offset=True),
        integer_args(units="live", offset=True),
    )
    planes, alpha, shift = binary_args()
    x, dy = torch.randn(5, K), torch.randn(5, N)

    def everything():
        packed, residual = kernels.quantize_pack(weight, scale, None, 4, 32, 4)
        grid = (packed, scale, None, None, 4)
        exact = [
            packed,
            residual,
            kernels.unpack(packed, 4, K),
            kernels.pack(kernels.unpack(packed, 4, K), 4),
            codes_of(plain, K),
            kernels.dequantize(*grid, K, 32, torch.bfloat16),
            kernels.binary_dequantize(planes, alpha, shift, K, 32, torch.float32),
        ]
        close = [
            kernels.packed_matmul(x, *grid, 32),
            kernels.packed_matmul_dx(dy, *grid, K, 32),
            kernels.grid_linear(x, **low),
            *kernels.grid_gradients(x, dy, **low),
            kernels.binary_matmul(x, planes, alpha, shift, 32),
            kernels.binary_matmul_dx(dy, planes, alpha, shift, K, 32),
            *kernels.binary_gradients(x, dy, planes, 32, 3),
        ]
        return exact, close, kernels.unpack(codes_of(low, K), 4, K)

    whole = everything()
    for elements in (K, 3 * K + 7, 1):
        monkeypatch.setattr(layout, "CHUNK_ELEMENTS", elements)
        assert len(layout.row_chunks(N, K)) > 1
        chunked = everything()
        assert all(torch.equal(c, w) for c, w in zip(chunked[0], whole[0], strict=True))
        for c, w in zip(chunked[1], whole[1], strict=True):
            assert error(c, w.double()) < 1e-6
        assert (chunked[2].int() - whole[2].int()).abs().max() <= 1 and (
            chunked[2] != whole[2]
        ).float().mean() < 1e-3


def test_bf16_partial_sums_over_chunks_stay_fp32(monkeypatch):
    a = integer_args(shape=(512, K))
    grid = (a["codes"], a["scale"], a["zero"], None, 4)
    dy = torch.randn(4, 512).bfloat16()
    want = dy.double() @ kernels.dequantize(*grid, K, 32, torch.bfloat16).double()
    whole = error(kernels.packed_matmul_dx(dy, *grid, K, 32), want)
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 4 * K)
    assert error(kernels.packed_matmul_dx(dy, *grid, K, 32), want) < 1.5 * whole + 1e-3


@pytest.mark.parametrize("zero", [False, True])
def test_codes_do_not_depend_on_the_number_of_threads(zero: bool):
    a = integer_args(shape=(96, 512), zero=zero, units="live")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(codes_of(a, 512))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
