"""Dense parts and masks through the Triton kernels: codes bit for bit those of the reference ops, and every
gradient near theirs (tests/kernels/test_ops.py holds the references to the equations in float64).
"""

from collections.abc import Iterator

import lowbit_kernels as kernels
import pytest
import torch
from lowbit_kernels import codes_triton, dispatch, gradients_triton, grid_rows_triton
from torch import Tensor

from tests.kernels.common import error, integer_args
from tests.kernels.interpreter.test_gradients import FORMS

M, N = 9, 19
SOME = torch.tensor([0, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18])
# Chunks of 16 rows: the second begins in the middle of the rows, and ends before its block does.
ROWS = {"BLOCK_N": 16, "SPAN": 4, "CHUNK_MB": 0.01, "num_warps": 1, "num_stages": 1}


def masked(args: dict, k: int) -> dict:
    return args | {"mask": kernels.pack((torch.rand(N, k) < 0.5).to(torch.uint8), 1)}


@pytest.mark.parametrize(
    ("bits", "group_size", "f", "zero", "some", "mask", "k", "dtype", "lowest"),
    [
        # 600 channels: the superblocks of codes, residual and mask end apart, and the mask's second is read.
        (4, 32, 4, True, True, True, 600, torch.float32, 0),
        (3, 128, 2, False, True, False, 200, torch.bfloat16, 0),
        (2, -1, 1, True, False, True, 200, torch.float32, 1),
        (8, 64, 0, False, False, False, 100, torch.float32, 0),
        (2, 64, 4, False, False, False, 100, torch.float32, 1),
        (6, 64, 4, True, True, True, 300, torch.float32, 0),
    ],
)
def test_codes_and_gradients_of_a_dense_part(bits, group_size, f, zero, some, mask, k, dtype, lowest):
    args = integer_args(bits, group_size, f, zero=zero, low_rank=False, clip_first=mask, shape=(N, k))
    args["lowest"] = lowest
    delta = (torch.randn(len(SOME) if some else N, k) * 2).to(dtype)
    delta[0, :2] = torch.tensor([1e9, -1e9])
    args |= {"delta": delta, "rows": SOME if some else None}
    args = masked(args, k) if mask else args
    codes = {name: value for name, value in args.items() if name != "clip_first"}
    got = codes_triton.grid_codes(**codes, in_features=k)
    assert torch.equal(got, kernels.grid_codes(**codes, in_features=k))
    assert not torch.equal(got, args["codes"]) and got.data_ptr() != args["codes"].data_ptr()
    x, dy = torch.randn(M, k), torch.randn(M, N)
    want = kernels.grid_row_gradients(x, dy, **args)
    if lowest:
        free = kernels.grid_row_gradients(x, dy, **{**args, "lowest": 0})
        assert min(error(want[i], free[i].double()) for i in (0, 2)) > 1e-3, "no value is clipped from below"
    with dispatch.override("grid_row_gradients", ROWS):
        made = grid_rows_triton.grid_row_gradients(x, dy, **args)
    for value, wanted in zip(made, want, strict=True):
        assert value.dtype == torch.float32 and error(value, wanted.double()) < 1e-6
    assert torch.equal(made[2] == 0, want[2] == 0), "the clip or the mask is another"


def test_a_dense_part_of_no_rows() -> None:
    args = integer_args(4, 32, 0, zero=False, low_rank=False, clip_first=False, shape=(N, 64))
    args |= {"delta": torch.zeros(0, 64), "rows": torch.zeros(0, dtype=torch.int64)}
    x, dy = torch.randn(M, 64), torch.randn(M, N)
    made = grid_rows_triton.grid_row_gradients(x, dy, **args)
    assert [t.shape for t in made] == [t.shape for t in kernels.grid_row_gradients(x, dy, **args)]


def exact_args(units: str, k: int, **options) -> dict:
    """Small integers in A and B, so that D is exact in any order and codes are equal bit for bit."""
    args = integer_args(4, 32, 4, units, clip_first=units == "live", shape=(N, k), **options)
    if args["a"] is not None:
        small = {"a": torch.randint(-3, 4, (3, k)).float(), "b": torch.randint(-3, 4, (N, 3)).float()}
        args |= small | {"gain": 0.5}
    return masked(args, k)


@pytest.mark.parametrize(
    ("units", "form", "zero", "k"),
    [("grid", "chunked", True, 600), ("weight", "blas", False, 100), ("live", "fused", True, 200)],
)
def test_codes_and_gradients_of_masked_weights(units: str, form: str, zero: bool, k: int):
    args = exact_args(units, k, zero=zero)
    codes = {name: value for name, value in args.items() if name != "clip_first"}
    got = codes_triton.grid_codes(**codes, in_features=k)
    assert torch.equal(got, kernels.grid_codes(**codes, in_features=k))
    x, dy = torch.randn(M, k), torch.randn(M, N)
    with dispatch.override("grid_gradients", FORMS[form]):
        made = gradients_triton.grid_gradients(x, dy, **args)
    want = kernels.grid_gradients(x, dy, **args)
    free = kernels.grid_gradients(x, dy, **{**args, "mask": None})
    for value, wanted, other in zip(made, want, free, strict=True):
        assert error(value, wanted.double()) < 2e-6 < error(wanted, other.double())


@pytest.mark.parametrize(
    ("units", "form"), [("grid", "fused"), ("weight", "chunked"), ("live", "chunked"), ("live", "fused")]
)
def test_codes_and_gradients_where_the_lowest_code_is_unused(units: str, form: str):
    """Ternary: three of the four codes of two bits."""
    k = 100
    args = exact_args(units, k, zero=False) | {"bits": 2, "mask": None, "lowest": 1}
    args["codes"] = kernels.pack(torch.randint(1, 4, (N, k), dtype=torch.uint8), 2)
    codes = {name: value for name, value in args.items() if name != "clip_first"}
    got = codes_triton.grid_codes(**codes, in_features=k)
    assert torch.equal(got, kernels.grid_codes(**codes, in_features=k))
    assert kernels.unpack(got, 2, k).unique().tolist() == [1, 2, 3]
    x, dy = torch.randn(M, k), torch.randn(M, N)
    with dispatch.override("grid_gradients", FORMS[form]):
        made = gradients_triton.grid_gradients(x, dy, **args)
    want = kernels.grid_gradients(x, dy, **args)
    free = kernels.grid_gradients(x, dy, **{**args, "lowest": 0})
    for name, value, wanted, other in zip("stab", made, want, free, strict=True):
        assert error(value, wanted.double()) < 2e-6, name
        # the offset of a grid that is not live knows no clip
        assert units != "live" and name == "t" or error(wanted, other.double()) > 1e-3, name


def test_a_frozen_grid_under_a_mask_with_one_scale_per_row():
    """Without a mask its gradients are no dW: the offset's is of all weights."""
    args = exact_args("grid", 100, low_rank=False) | {"group_size": -1}
    args |= {name: args[name][:1] for name in ("scale0", "zero0", "scale", "zero")}
    assert torch.equal(
        codes_triton.grid_codes(**{n: v for n, v in args.items() if n != "clip_first"}, in_features=100),
        args["codes"],
    )
    x, dy = torch.randn(M, 100), torch.randn(M, N)
    made, want = gradients_triton.grid_gradients(x, dy, **args), kernels.grid_gradients(x, dy, **args)
    assert max(error(g, w.double()) for g, w in zip(made[:2], want[:2], strict=True)) < 1e-6


GRID_OPS = ("grid_codes", "grid_gradients", "grid_row_gradients")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The grid ops of CPU tensors go where those of CUDA tensors go, until the test is over. The names of
    those that were launched.
    """
    seen: list[str] = []
    modules = (codes_triton, gradients_triton, grid_rows_triton)
    kinds = {op: getattr(module, op) for op, module in zip(GRID_OPS, modules, strict=True)}

    def launcher(op: str):
        def run(*args):
            seen.append(op)
            return kinds[op](*args)

        return run

    monkeypatch.setattr(dispatch, "launcher", launcher)
    for op in GRID_OPS:
        dispatch.definition(op).register_kernel("cpu")(dispatch._implementation(op))
    yield seen
    for op in GRID_OPS:
        dispatch.definition(op).register_kernel("cpu")(dispatch.definition(op)._init_fn)


def test_a_step_of_chosen_rows_is_launched_and_multiplies_their_share(launches, monkeypatch):
    """Nothing of a step with a dense part and a mask is the reference's, and dW is of the chosen rows: R / N
    of a product beside dX. The codes of a merge are those of the step."""
    k = 96
    args = exact_args("grid", k, low_rank=False)
    delta, scale = torch.randn(len(SOME), k, requires_grad=True), args["scale"].requires_grad_()
    args |= {"delta": delta, "rows": SOME, "clip_first": False}
    products: list[int] = []
    real = torch.mm

    def counted(left: Tensor, right: Tensor, **options: Tensor) -> Tensor:
        products.append(left.shape[0] * left.shape[1] * right.shape[1])
        return real(left, right, **options)

    monkeypatch.setattr(torch, "mm", counted)
    x = torch.randn(M, k, requires_grad=True)
    with dispatch.override("grid_row_gradients", ROWS):
        y = kernels.grid_linear(x, **args, tokens=0.1)
        y.sum().backward()
    # codes of the forward, of dX; the scales of other rows from dW of one of nine tokens; the chosen rows
    assert launches == ["grid_codes", "grid_codes", "grid_gradients", "grid_row_gradients"]
    assert sum(products[1:]) == len(SOME) * M * k and products[0] == N * 1 * k
    assert delta.grad is not None and scale.grad is not None
    codes = {name: value for name, value in args.items() if name not in ("clip_first", "group_size")}
    merged = kernels.grid_codes(**codes, in_features=k, group_size=32)
    shipped = kernels.dequantize(merged, scale, args["zero"], None, 4, k, 32, torch.float32)
    assert torch.equal(torch.nn.functional.linear(x, shipped), y)
