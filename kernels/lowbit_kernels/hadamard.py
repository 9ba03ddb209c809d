"""hadamard: y = x H / sqrt(D) along the last axis, in blocks of D channels. Orthonormal, symmetric, its own
inverse.

A Hadamard matrix has entries +-1 and orthogonal rows; multiplying by it spreads an outlier channel over all D
channels. Written D = m * 2^p with m = 1 or a multiple of 4, the matrix here is H_m (x) H_2 (x) ... (x) H_2
(Kronecker), where H_m is one of Paley's two matrices over a finite field of q elements, chi(a) = 1, -1, 0 for
a square, a non-square, zero:

    q = 3 mod 4, m = q + 1:      [[1, 1'], [1, C]],  C[a, b] = chi(a + b) - [a + b = 0]
    q = 1 mod 4, m = 2 (q + 1):  S (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]],  S = [[0, 1'], [1, chi(a
                                 - b)]]

(Paley 1933; the first is usually written with a - b, and a + b is the same matrix with its columns reordered
so that it is symmetric). Symmetric means that the op is its own gradient: dX = hadamard(dY). m is the
smallest order that divides D in such a way that D / m is a power of two: 4096 = 2^12, 14336 = 28 * 2^9, 5120
= 20 * 2^8, 11008 = 344 * 2^5.
"""

import functools
import itertools

import torch
from torch import Tensor

from .layout import outside_autocast


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e, p prime, or None."""
    p = next((d for d in range(2, q + 1) if q % d == 0), 0)
    e = 0
    while p and q % p == 0:
        q, e = q // p, e + 1
    return (p, e) if p and q == 1 else None


def _paley(m: int) -> int | None:
    """The field size q that gives a Hadamard matrix of order m, preferring the first form, or None."""
    for q, residue in ((m - 1, 3), (m // 2 - 1, 1)):
        power = _prime_power(q) if m % 4 == 0 and q > 2 and q % 4 == residue else None
        if power is not None and power[1] <= 3:  # our irreducible polynomials stop at degree 3
            return q
    return None


def hadamard_problem(size: int) -> str | None:
    """Why there is no Hadamard matrix of that order; None where there is one."""
    try:
        factors(size)
    except ValueError as error:
        return str(error)
    return None


@functools.cache
def factors(block: int) -> tuple[int, int]:
    """block = m * 2^p -> (m, 2^p). ValueError where no order is known."""
    if block < 1:
        raise ValueError(
            f"a Hadamard transform of {block} channels: the block must be a positive number of channels"
        )
    power = block & -block
    odd = block // power
    if odd == 1:
        return 1, block
    m = 4 * odd
    while block % m == 0:
        if _paley(m) is not None:
            return m, block // m
        m *= 2
    raise ValueError(
        f"no Hadamard matrix for {block} = {odd} * {power} channels is built in; choose a block that "
        "divides it, for "
        f"example the power of two {power}"
    )


def _squares(p: int, e: int) -> tuple[list[tuple[int, ...]], set[tuple[int, ...]]]:
    """Elements of the field of p^e as coefficient tuples (lowest degree first), and the non-zero squares
    among them.
    """
    elements = [tuple(reversed(c)) for c in itertools.product(range(p), repeat=e)]
    # x^e = low(x) where x^e - low(x) has no root: for degree 2 and 3 that makes it irreducible.
    low = next(
        (
            c
            for c in elements
            if e > 1 and all((r**e - sum(v * r**i for i, v in enumerate(c))) % p for r in range(p))
        ),
        (0,) * e,
    )
    squares = set()
    for value in elements[1:]:
        product = [0] * (2 * e - 1)
        for i, j in itertools.product(range(e), repeat=2):
            product[i + j] += value[i] * value[j]
        for degree in range(2 * e - 2, e - 1, -1):
            top = product[degree]
            for i, v in enumerate(low):
                product[degree - e + i] += top * v
        squares.add(tuple(v % p for v in product[:e]))
    return elements, squares


@functools.cache
def matrix(m: int) -> Tensor:
    """The symmetric Hadamard matrix of order m (1, a power of two, or one of Paley's), int8 [m, m] on the
    CPU. Do not write into it: it is shared."""
    if m & (m - 1) == 0:
        h = torch.ones(1, 1, dtype=torch.int8)
        while h.shape[0] < m:
            h = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), h)
        return h
    q = _paley(m)
    power = _prime_power(q) if q is not None else None
    assert q is not None and power is not None, "factors() only returns orders that exist"
    elements, squares = _squares(*power)
    sign = 1 if q % 4 == 3 else -1  # a + b in the first form, a - b in the second

    def chi(a: tuple[int, ...], b: tuple[int, ...]) -> int:
        value = tuple((x + sign * y) % power[0] for x, y in zip(a, b, strict=True))
        return 0 if not any(value) else 1 if value in squares else -1

    core = torch.tensor([[chi(a, b) for b in elements] for a in elements], dtype=torch.int8)
    h = torch.ones(q + 1, q + 1, dtype=torch.int8)
    if sign == 1:
        h[1:, 1:] = core - (core == 0).to(torch.int8)
        return h
    h[0, 0] = 0
    h[1:, 1:] = core
    inner = torch.kron(h, torch.tensor([[1, 1], [1, -1]], dtype=torch.int8))
    eye = torch.eye(q + 1, dtype=torch.int8)
    return inner + torch.kron(eye, torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8))


def resolved(block: int, channels: int) -> int:
    """The block in channels: -1 stands for all of them. ValueError where it does not divide them."""
    block = channels if block == -1 else block
    if block < 1 or channels % block:
        raise ValueError(
            f"block={block}: must be -1 (all channels) or a divisor of the {channels} channels of x"
        )
    factors(block)
    return block


@torch.library.custom_op("lowbit::hadamard", mutates_args=())
@outside_autocast
def hadamard(x: Tensor, block: int) -> Tensor:
    """x [..., K] float times the orthonormal Hadamard matrix of order `block` on each run of `block` channels
    (-1: K), in x's dtype. Computed in fp32 and rounded once. Differentiable; hadamard(hadamard(x)) is x up to
    rounding."""
    block = resolved(block, x.shape[-1])
    m, power = factors(block)
    value = x.to(torch.float32).reshape(-1, block)
    half = 1
    while half < power:  # one butterfly per factor H_2
        pair = value.view(-1, block // (2 * half), 2, half)
        value = torch.stack((pair[:, :, 0] + pair[:, :, 1], pair[:, :, 0] - pair[:, :, 1]), 2).view(-1, block)
        half *= 2
    if m > 1:
        value = torch.einsum("ab,tbp->tap", matrix(m).to(value), value.view(-1, m, power))
    return (value * block**-0.5).reshape(x.shape).to(x.dtype)


@hadamard.register_fake
def _(x: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    ctx.block = inputs[1]


def _backward(ctx, dy):
    return hadamard(dy, ctx.block), None


hadamard.register_autograd(_backward, setup_context=_setup)
