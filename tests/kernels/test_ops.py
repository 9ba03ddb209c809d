"""The ops against float64, through torch.library's own checks, torch.compile, small chunks and autocast."""

import itertools
import math

import lowbit_kernels as kernels
import pytest
import torch
from lowbit_kernels import layout
from lowbit_kernels.codes import UNITS
from torch import Tensor

from tests import reference

pytestmark = pytest.mark.usefixtures("poison")
N, K, R = 13, 200, 3


def integer_args(
    bits: int = 4,
    group_size: int = 32,
    f: int = 4,
    units: str = "grid",
    *,
    zero: bool = True,
    offset: bool = False,
    low_rank: bool = True,
    clip_first: bool = False,
    shape: tuple[int, int] = (N, K),
) -> dict:
    """Arguments of grid_linear (x aside), by name, with values that move codes and clip some."""
    n, k = shape
    groups = (kernels.group_count(k, group_size), n)
    return {
        "codes": kernels.pack(torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8), bits),
        "residual": kernels.pack(torch.randint(0, 1 << f, (n, k), dtype=torch.uint8), f) if f else None,
        "scale0": (torch.rand(groups) + 0.5).bfloat16(),
        "zero0": torch.randint(0, 1 << bits, groups, dtype=torch.uint8) if zero else None,
        "a": torch.randn(R, k) if low_rank else None,
        "b": torch.randn(n, R) * 0.5 if low_rank else None,
        "scale": torch.rand(groups) + 0.5,
        "zero": torch.randint(0, 1 << bits, groups).float() if zero else None,
        "offset": torch.randn(groups) * 0.3 if offset else None,
        "gain": 0.7,
        "units": units,
        "bits": bits,
        "residual_bits": f,
        "group_size": group_size,
        "clip_first": clip_first,
    }


def dense(args: dict, k: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(v, W, leaves): the equations of codes.py and grid_linear.py in float64, straight-through, leaves a, b,
    scale, offset.
    """
    bits, g = args["bits"], args["group_size"]
    half, top = 2.0 ** (bits - 1), 2**bits - 1
    leaves = {
        n: args[n].double().requires_grad_() for n in ("a", "b", "scale", "offset") if args[n] is not None
    }

    def wide(t):
        return reference.columns(t, k, g)

    value = reference.unpack(args["codes"], bits, k).double()
    if args["residual_bits"]:
        f = args["residual_bits"]
        value = value + (reference.unpack(args["residual"], f, k).double() + 0.5) / 2**f - 0.5
    z0 = half if args["zero0"] is None else wide(args["zero0"])
    z = half if args["zero"] is None else wide(args["zero"])
    s0, s = wide(args["scale0"]), wide(leaves["scale"])
    t = wide(leaves["offset"]) if "offset" in leaves else 0.0
    d = args["gain"] * leaves["b"] @ leaves["a"] if "a" in leaves else 0.0
    if args["units"] == "grid":
        value = value + d
    elif args["units"] == "weight":
        value = value + d / s0
    else:
        value = (s0 * (value - z0) + d - t) / s + z
    low, high = torch.zeros_like(s0), torch.full_like(s0, float(top))
    order = "clip_then_round" if args["clip_first"] else "round_then_clip"
    code = reference.quantized(value, low, high, order)
    return value.detach(), s * (code - z) + t, leaves


def untied(**kwargs) -> tuple[dict, Tensor, Tensor, dict[str, Tensor]]:
    """Arguments for which no value lies within fp32 error of a rounding tie."""
    for _ in range(10):
        args = integer_args(**kwargs)
        value, weight, leaves = dense(args, K)
        if ((value % 1) - 0.5).abs().min() > 2e-5:
            return args, value, weight, leaves
    raise AssertionError("ten draws with a tie")


def error(got: Tensor, want: Tensor) -> float:
    """Relative error; infinite where anything is not finite, because max() of several errors would pass over
    a NaN.
    """
    value = ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
    return value if math.isfinite(value) else math.inf


def codes_of(args: dict, k: int) -> Tensor:
    names = [n for n in args if n not in ("group_size", "clip_first")]
    return kernels.grid_codes(**{n: args[n] for n in names}, in_features=k, group_size=args["group_size"])


GRID_CASES = list(itertools.product((2, 3, 4, 8), (32, 128, -1), UNITS, (False, True)))


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


def test_grid_gradients_shapes():
    args = integer_args(low_rank=False)
    static = {n: args[n] for n in args}
    ds, dt, da, db = kernels.grid_gradients(torch.randn(5, K), torch.randn(5, N), **static)
    assert ds.shape == dt.shape == args["scale"].shape and da.shape == db.shape == (0,)


def test_only_what_is_asked_for_gets_a_gradient():
    args = integer_args(offset=True)
    args["b"].requires_grad_()
    kernels.grid_linear(torch.randn(5, K), **args).sum().backward()
    assert args["b"].grad is not None and args["a"].grad is None and args["scale"].grad is None


def test_unknown_units_are_refused():
    args = integer_args()
    with pytest.raises(ValueError, match="'grid', 'weight', 'live'"):
        kernels.grid_linear(torch.randn(2, K), **{**args, "units": "step"})


@pytest.mark.parametrize(("bits", "group_size"), list(itertools.product((2, 3, 4, 8), (32, 128, -1))))
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


def binary_args(
    q: int = 3, group_size: int = 32, offset: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    groups = (kernels.group_count(K, group_size), N)
    planes = torch.stack([kernels.pack(torch.randint(0, 2, (N, K), dtype=torch.uint8), 1) for _ in range(q)])
    return planes, torch.rand(q, *groups) + 0.1, torch.randn(groups) if offset else None


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
    dw = dy.double().t() @ x.double()
    want = torch.stack([c.sum(1) for c in torch.nn.functional.pad(dw, (0, -K % 32)).split(32, dim=1)])
    assert error(dt, want) < 1e-6


def samples() -> dict[str, tuple]:
    """One call of every op, ragged shapes, for opcheck. The table must know every op of the namespace."""
    a = integer_args(bits=3, units="live", offset=True)
    x, dy = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    planes, alpha, shift = binary_args()
    state = tuple(a[n] for n in ("codes", "residual", "scale0", "zero0", "a", "b", "scale", "zero", "offset"))
    static = (0.7, "live", 3, 4)
    grid = (a["codes"], a["scale"], a["zero"], a["offset"], 3)
    train = tuple(t.clone().requires_grad_() if i in (4, 5, 6, 8) else t for i, t in enumerate(state))
    leaves = (alpha.clone().requires_grad_(), shift.clone().requires_grad_())
    return {
        "pack": (torch.randint(0, 8, (N, K), dtype=torch.uint8), 3),
        "unpack": (a["codes"], 3, K),
        "quantize_pack": (torch.randn(N, K), a["scale"], a["zero"], 3, 32, 4),
        "dequantize": (*grid, K, 32, torch.bfloat16),
        "grid_codes": (*state, *static, K, 32),
        "packed_matmul": (x, *grid, 32),
        "packed_matmul_dx": (dy, *grid, K, 32),
        "grid_linear": (x, *train, *static, 32, True),
        "grid_gradients": (x.detach(), dy, *state, *static, 32, True),
        # All tokens: opcheck runs an op twice and compares.
        "grid_estimates": (
            x.detach(),
            dy,
            None,
            None,
            *state,
            *static,
            32,
            True,
            "factorised",
            1.0,
            True,
            True,
        ),
        "binary_dequantize": (planes, alpha, shift, K, 32, torch.float32),
        "binary_matmul": (x, planes, *leaves, 32),
        "binary_matmul_dx": (dy, planes, alpha, shift, K, 32),
        "binary_gradients": (x.detach(), dy, planes, 32, 2),
        "round_values": (torch.randn(5, 4).requires_grad_(), torch.bfloat16),
        "exact_exp": (torch.randn(5, 4).requires_grad_(),),
        "hadamard": (torch.randn(5, 24, requires_grad=True), 12),
    }


def test_every_op_has_a_sample():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lowbit::")]
    assert {name.partition("::")[2].partition(".")[0] for name in names} == set(samples())


@pytest.mark.parametrize("name", list(samples()))
def test_opcheck(name: str):
    """Schema, fake tensor and autograd registration, and AOT dispatch with dynamic shapes, as PyTorch tests
    its own ops.
    """
    torch.use_deterministic_algorithms(
        False
    )  # opcheck runs an op twice and compares; poison is for the tests above
    torch.library.opcheck(getattr(torch.ops.lowbit, name), samples()[name])


@pytest.mark.parametrize("name", list(samples()))
def test_compiles_whole_and_knows_its_shapes(name: str):
    """torch.compile without a graph break gives the eager values; on meta tensors the op gives their shapes
    and dtypes.
    """
    op, args = getattr(torch.ops.lowbit, name), samples()[name]
    eager = op(*args)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")(*args)
    meta = op(*(a.detach().to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    if isinstance(eager, torch.Tensor):
        eager, compiled, meta = (eager,), (compiled,), (meta,)
    for value, again, shape in zip(eager, compiled, meta, strict=True):
        assert torch.equal(value, again)
        assert shape.is_meta and (shape.shape, shape.dtype) == (value.shape, value.dtype)


def test_opcheck_without_optional_tensors():
    a = integer_args(zero=False, low_rank=False, f=0)
    scale = a["scale"].requires_grad_()
    args = (a["codes"], None, a["scale0"], None, None, None, scale, None, None, 1.0, "grid", 4, 0, 32, False)
    torch.library.opcheck(torch.ops.lowbit.grid_linear, (torch.randn(5, K, requires_grad=True), *args))
    planes, alpha, _ = binary_args()
    torch.library.opcheck(
        torch.ops.lowbit.binary_matmul, (torch.randn(5, K), planes, alpha.requires_grad_(), None, 32)
    )
    torch.library.opcheck(
        torch.ops.lowbit.quantize_pack, (torch.randn(N, K), a["scale"].detach(), None, 4, 32, 0)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_round_values_and_exact_exp(dtype: torch.dtype):
    value = torch.randn(50, requires_grad=True)
    rounded, grad = kernels.round_values(value, dtype), torch.randn(50)
    assert torch.equal(rounded, value.detach().to(dtype).float())
    assert torch.equal(torch.autograd.grad(rounded, value, grad)[0], grad)
    power = kernels.exact_exp(value)
    assert torch.equal(power, value.detach().exp())
    assert torch.equal(torch.autograd.grad(power, value, grad)[0], grad * power.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_graph_break(dtype: torch.dtype):
    a = integer_args(units="live", offset=True)
    planes, alpha, shift = binary_args()

    def step(x, a_, b_, scale, offset, alpha, shift):
        args = {**a, "a": a_, "b": b_, "scale": scale, "offset": offset}
        y = kernels.grid_linear(x * 2, **args)
        z = kernels.binary_matmul(x, planes, alpha, shift, 32)
        return (y * z).sum()

    leaves = [torch.randn(4, K).to(dtype), a["a"], a["b"], a["scale"], a["offset"], alpha, shift]
    leaves = [t.clone().requires_grad_() for t in leaves]
    eager = step(*leaves)
    want = torch.autograd.grad(eager, leaves)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    got = torch.autograd.grad(compiled, leaves)
    assert torch.equal(compiled, eager)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


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


@pytest.mark.parametrize(
    "name", ["grid_linear", "grid_gradients", "grid_codes", "packed_matmul", "binary_matmul"]
)
def test_autocast_leaves_the_inside_of_an_op_alone(name: str):
    args = samples()[name]
    op = getattr(torch.ops.lowbit, name)
    want = op(*args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = op(*args)
    for g, w in zip(
        got if isinstance(got, tuple) else [got], want if isinstance(want, tuple) else [want], strict=True
    ):
        assert g.dtype == w.dtype and torch.equal(g, w)


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
