"""The Hadamard op: its matrices, float64, gradients, and torch.library's own checks."""

import importlib

import lowbit_kernels as lk
import pytest
import torch

module = importlib.import_module("lowbit_kernels.hadamard")  # the package's attribute of this name is the op
ORDERS = [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 52, 60, 76, 84, 100, 108, 124, 140, 148, 312, 344]


@pytest.mark.parametrize("order", ORDERS)
def test_the_matrices_are_symmetric_hadamard(order):
    m, power = module.factors(order)
    assert m * power == order and power & (power - 1) == 0 and (m == 1 or m % 4 == 0)
    h = torch.kron(module.matrix(m), module.matrix(power)).double()
    assert (h.abs() == 1).all() and torch.equal(h, h.t())
    assert torch.equal(h @ h, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize(
    ("channels", "m"),
    [(4096, 1), (14336, 28), (5120, 20), (13824, 108), (18944, 148), (11008, 344), (576, 36)],
)
def test_sizes_of_real_models(channels, m):
    assert module.factors(channels) == (m, channels // m)


@pytest.mark.parametrize(("channels", "block"), [(96, -1), (96, 32), (96, 12), (64, 64), (1, -1), (7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(channels, block, dtype):
    size = channels if block == -1 else block
    m, power = module.factors(size)
    dense = torch.kron(module.matrix(m), module.matrix(power)).double() / size**0.5
    x = torch.randn(2, 3, channels).to(dtype)
    want = (x.double().view(-1, size) @ dense).view(x.shape)
    got = lk.hadamard(x, block)
    assert got.dtype == dtype and ((got.double() - want).norm() / want.norm()).item() < torch.finfo(dtype).eps
    twice = lk.hadamard(lk.hadamard(x.float(), block), block)
    torch.testing.assert_close(twice, x.float())


def test_gradient_is_the_transform_itself():
    x, dy = torch.randn(3, 24, requires_grad=True), torch.randn(3, 24)
    (got,) = torch.autograd.grad(lk.hadamard(x, 12), x, dy)
    assert torch.equal(got, lk.hadamard(dy, 12))
    torch.library.opcheck(lk.hadamard, (torch.randn(3, 24, requires_grad=True), 12))
    torch.library.opcheck(lk.hadamard, (torch.randn(2, 24).t().contiguous().t(), -1))


def test_compiles_whole():
    x = torch.randn(3, 24)
    step = torch.compile(lambda v: lk.hadamard(v, -1) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(x), lk.hadamard(x, -1) + 1)
    assert lk.hadamard(torch.empty(2, 24, device="meta"), -1).shape == (2, 24)


@pytest.mark.parametrize(
    ("channels", "block", "what"),
    [
        (96, 36, "divisor of the 96"),
        (96, 0, "divisor"),
        (96, -2, "divisor"),
        (7, -1, "power of two 1"),
        (116, -1, "power of two 4"),
    ],
)
def test_what_is_refused(channels, block, what):
    with pytest.raises(ValueError, match=what):
        lk.hadamard(torch.randn(1, channels), block)
