"""Every op through torch.library's own checks, torch.compile and autocast."""

import lowbit_kernels as kernels
import pytest
import torch
from lowbit_kernels.grid import GridWeight

from tests.kernels.common import K, N, binary_args, integer_args

pytestmark = pytest.mark.usefixtures("poison")


def samples() -> dict[str, tuple]:
    """One call of every op, ragged shapes, for opcheck. The table must know every op of the namespace."""
    a = integer_args(bits=3, units="live", offset=True)
    x, dy = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    planes, alpha, shift = binary_args()
    state = tuple(a[n] for n in GridWeight._fields[: GridWeight._fields.index("gain")])
    static = (0.7, "live", 3, 4, 0)
    some = {"a": None, "b": None, "delta": torch.randn(4, K), "rows": torch.tensor([1, 4, 7, 12])}
    dense = GridWeight(**{n: {**a, **some}[n] for n in GridWeight._fields})[: len(state)]
    grid = (a["codes"], a["scale"], a["zero"], a["offset"], 3)
    train = tuple(t.clone().requires_grad_() if i in (4, 5, 8, 10) else t for i, t in enumerate(state))
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
        "grid_row_gradients": (x.detach(), dy, *dense, 1.0, "grid", 3, 4, 0, 32, True),
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
        "group_sums": (a["codes"], 3, K, 32),
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
    args = (a["codes"], None, a["scale0"], *[None] * 5, scale, *[None] * 3, 1.0, "grid", 4, 0, 0, 32, False)
    torch.library.opcheck(torch.ops.lowbit.grid_linear, (torch.randn(5, K, requires_grad=True), *args))
    planes, alpha, _ = binary_args()
    torch.library.opcheck(
        torch.ops.lowbit.binary_matmul, (torch.randn(5, K), planes, alpha.requires_grad_(), None, 32)
    )
    torch.library.opcheck(
        torch.ops.lowbit.quantize_pack, (torch.randn(N, K), a["scale"].detach(), None, 4, 32, 0)
    )


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


def test_opcheck_of_a_dense_part():
    """Of some rows; the scales of the others learn from all tokens, so that nothing is drawn."""
    a = integer_args(low_rank=False)
    delta, rows = torch.randn(4, K, requires_grad=True), torch.tensor([1, 4, 7, 12])
    args = {**a, "delta": delta, "rows": rows, "scale": a["scale"].requires_grad_()}
    grid = GridWeight(**{name: args[name] for name in GridWeight._fields})
    torch.library.opcheck(torch.ops.lowbit.grid_codes, (*grid, K, 32))
    x = torch.randn(5, K, requires_grad=True)
    torch.library.opcheck(torch.ops.lowbit.grid_linear, (x, *grid, 32, False))
