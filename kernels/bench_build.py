"""The benchmark's cases, built: our op on each, and the peers it is compared with.

Tensors are made once per copy (several copies are rotated so that no weight is in the L2 cache when its turn
comes), and a case gives closures over them. A peer that cannot be built on this machine is left out, with the
reason in the results.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lowbit_kernels as lk
import torch
from bench_cases import Case
from bench_peers import bitsandbytes, gemlite, optional, relative
from lowbit_kernels import dispatch
from torch import Tensor

Call = Callable[[], Any]
# Peers that may be missing, or take long: "torch.compile" compiles for tens of seconds.
PEERS = frozenset({"bitsandbytes nf4", "gemlite", "torch.compile"})


@dataclass
class Built:
    """Closures of one case. calls[name] has one closure per copy of the weights; the first is ours."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    check: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0)  # our error, the error allowed
    peers: frozenset[str] = frozenset()  # the optional ones that are wanted, of PEERS


def packed(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random codes, all of them present, and scales that keep activations of ordinary size."""
    codes = torch.randint(0, 1 << case.bits, (case.n, case.k), dtype=torch.uint8, device=device)
    groups = lk.group_count(case.k, case.group)
    scale = (torch.rand(groups, case.n, device=device) + 0.5) * (0.05 / (1 << case.bits))
    return lk.pack(codes, case.bits), scale.to(torch.bfloat16)


def build(case: Case, device: torch.device, copies: int, peers: frozenset[str] = PEERS) -> Built:
    """Tensors and closures of a case, and those of PEERS that are named."""
    made = Built(peers=peers)
    g = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(case.m, case.k, device=device, generator=g).to(case.dtype)
    dy = torch.randn(case.m, case.n, device=device, generator=g).to(case.dtype)
    {
        "packed_matmul": _forward,
        "packed_matmul_dx": _dx,
        "scale_gradient": _scale_gradient,
        "row_gradients": _row_gradients,
        "grid_step": _grid_step,
        "binary_matmul": _binary,
        "quantize_pack": _quantize,
        "hadamard": _hadamard,
        "grid_codes": _codes,
        "dequantize": _dequantize,
    }[case.op](made, case, x, dy, copies)
    return made


def _allowed(rounded: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """1.5 times the error of the same computation in torch with equally rounded inputs, plus one rounding
    of the result.
    """
    return 1.5 * relative(rounded, exact) + 4 * torch.finfo(torch.float32).eps


def _forward(made: Built, case: Case, x: Tensor, dy: Tensor, copies: int) -> None:
    weights = [packed(case, x.device) for _ in range(copies)]
    dense = [
        lk.dequantize(c, s, None, None, case.bits, case.k, case.group, case.dtype)
        for c, s in weights[: _dense(case, copies)]
    ]
    made.calls["ours"] = [
        lambda c=c, s=s: lk.packed_matmul(x, c, s, None, None, case.bits, case.group) for c, s in weights
    ]
    made.calls["cublas"] = [lambda w=w: torch.nn.functional.linear(x, w) for w in dense]
    reference = dispatch.definition("packed_matmul")._init_fn
    made.calls["torch unpack"] = [
        lambda c=c, s=s: reference(x, c, s, None, None, case.bits, case.group) for c, s in weights[:1]
    ]
    if case.bits == 4 and x.is_cuda:
        want = made.calls["cublas"][0]()
        optional(
            made, "bitsandbytes nf4", lambda: bitsandbytes(x, dense), want, 0.2
        )  # another grid: its own error is 0.1
        optional(made, "gemlite", lambda: gemlite(case, x, weights), want, 0.02)

    def check() -> tuple[float, float]:
        exact = (
            x.double()
            @ lk.dequantize(*weights[0], None, None, case.bits, case.k, case.group, torch.float32)
            .double()
            .t()
        )
        return relative(made.calls["ours"][0](), exact), _allowed(
            made.calls["cublas"][0](), exact, case.dtype
        )

    made.check = check


def _dense(case: Case, copies: int) -> int:
    """Copies of the dense weight: it is 16 / bits times larger, so fewer are enough to leave the cache."""
    return max(1, min(copies, -(-copies * case.bits // 16) + 1))


def _dx(made: Built, case: Case, x: Tensor, dy: Tensor, copies: int) -> None:
    weights = [packed(case, x.device) for _ in range(copies)]
    dense = [
        lk.dequantize(c, s, None, None, case.bits, case.k, case.group, case.dtype)
        for c, s in weights[: _dense(case, copies)]
    ]
    made.calls["ours"] = [
        lambda c=c, s=s: lk.packed_matmul_dx(dy, c, s, None, None, case.bits, case.k, case.group)
        for c, s in weights
    ]
    made.calls["cublas"] = [lambda w=w: dy @ w for w in dense]

    def check() -> tuple[float, float]:
        exact = (
            dy.double()
            @ lk.dequantize(*weights[0], None, None, case.bits, case.k, case.group, torch.float32).double()
        )
        return relative(made.calls["ours"][0](), exact), _allowed(
            made.calls["cublas"][0](), exact, case.dtype
        )

    made.check = check


def _grid(case: Case, x: Tensor) -> dict:
    codes, scale = packed(case, x.device)
    mask = rows = None
    if case.masked:
        zeros = torch.rand(case.n, case.k, device=x.device) < 0.5
        whole = lk.unpack(codes, case.bits, case.k).masked_fill_(zeros, 1 << (case.bits - 1))
        codes, mask = lk.pack(whole, case.bits), lk.pack(zeros.to(torch.uint8), 1)
    if 0 < case.rows < case.n:
        rows = torch.randperm(case.n, device=x.device)[: case.rows].sort().values
    a = torch.randn(case.rank, case.k, device=x.device) if case.rank else None
    b = torch.randn(case.n, case.rank, device=x.device) * 0.3 if case.rank else None
    return {
        "codes": codes,
        "residual": None,
        "scale0": scale,
        "zero0": None,
        "a": a,
        "b": b,
        "delta": torch.randn(case.rows, case.k, device=x.device) if case.rows else None,
        "rows": rows,
        "scale": scale.float(),
        "zero": None,
        "offset": None,
        "mask": mask,
        "gain": 1.0,
        "units": "grid",
        "bits": case.bits,
        "residual_bits": 0,
        "lowest": 0,
        "group_size": case.group,
        "clip_first": False,
    }


def _scale_gradient(made: Built, case: Case, x: Tensor, dy: Tensor, copies: int) -> None:
    args = _grid(case, x)
    made.calls["ours"] = [lambda: lk.grid_gradients(x, dy, **args)]
    made.calls["cublas dW"] = [lambda: dy.t() @ x]
    reference = dispatch.definition("grid_gradients")._init_fn
    made.calls["eager"] = [lambda: reference(x, dy, **args)]

    def check() -> tuple[float, float]:
        exact, rounded = (reference(a, b, **args) for a, b in ((x.float(), dy.float()), (x, dy)))
        count = 4 if case.rank else 1  # dS, dT, dA, dB
        return _worst(lk.grid_gradients(x, dy, **args)[:count], rounded[:count], exact[:count], case.dtype)

    made.check = check


def _row_gradients(made: Built, case: Case, x: Tensor, dy: Tensor, copies: int) -> None:
    args = _grid(case, x)
    some = dy if args["rows"] is None else dy[:, args["rows"]]
    made.calls["ours"] = [lambda: lk.grid_row_gradients(x, dy, **args)]
    made.calls["cublas dW"] = [lambda: some.t() @ x]
    reference = dispatch.definition("grid_row_gradients")._init_fn
    made.calls["eager"] = [lambda: reference(x, dy, **args)]

    def check() -> tuple[float, float]:
        exact, rounded = (reference(a, b, **args) for a, b in ((x.float(), dy.float()), (x, dy)))
        return _worst(lk.grid_row_gradients(x, dy, **args), rounded, exact, case.dtype)

    made.check = check


def _worst(
    got: tuple[Tensor, ...], rounded: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[float, float]:
    """Error and allowance of the result that comes closest to its allowance, or exceeds it."""
    pairs = [(relative(g, e), _allowed(r, e, dtype)) for g, r, e in zip(got, rounded, exact, strict=True)]
    return max(pairs, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else float("inf"))


def _codes(made: Built, case: Case, x: Tensor, dy: Tensor, copies: int) -> None:
    args = {name: value for name, value in _grid(case, x).items() if name not in ("group_size", "clip_first")}
    more = {"in_features": case.k, "group_size": case.group}
    made.calls["ours"] = [lambda: lk.grid_codes(**args, **more)]

    def check() -> tuple[float, float]:
        """The share of codes that differ from the reference's: its product adds in another order, so a tie
        may fall the other way. A dense part is given: there none may differ.
        """
        want = dispatch.definition("grid_codes")._init_fn(**args, **more)
        got = lk.grid_codes(**args, **more)
        return (
            lk.unpack(got, case.bits, case.k) != lk.unpack(want, case.bits, case.k)
        ).float().mean().item(), 0.0 if case.rows else 1e-4

    made.check = check


def _dequantize(made: Built, case: Case, x: Tensor, dy: Tensor, copies: int) -> None:
    weights = [packed(case, x.device) for _ in range(copies)]
    rest = (None, None, case.bits, case.k, case.group, case.dtype)
    made.calls["ours"] = [lambda c=c, s=s: lk.dequantize(c, s, *rest) for c, s in weights]

    def check() -> tuple[float, float]:
        want = dispatch.definition("dequantize")._init_fn(*weights[0], *rest)
        return (lk.dequantize(*weights[0], *rest) != want).float().mean().item(), 0.0

    made.check = check


def _eager_step(case: Case, base: Tensor, args: dict, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """The same layer as plain autograd writes it: straight-through round, N x K intermediates kept for
    backward.
    """
    live = {name: args[name].detach().requires_grad_() for name in _trained(case)}
    if case.rank:
        v = base + live["b"] @ live["a"]
    else:
        v = base + live["delta"] if args["rows"] is None else base.index_add(0, args["rows"], live["delta"])
    rounded = v + (v.round() - v).detach()
    code = rounded.clamp(0, (1 << case.bits) - 1) - (1 << (case.bits - 1))
    size = case.k if case.group == -1 else case.group
    weight = (code.view(case.n, -1, size) * live["scale"].t()[:, :, None]).view(case.n, case.k)
    if args["mask"] is not None:
        weight = weight * (1 - lk.unpack(args["mask"], 1, case.k))
    x = x.detach().requires_grad_()
    y = torch.nn.functional.linear(x, weight.to(x.dtype))
    return torch.autograd.grad(y, (x, *live.values()), dy)


def _trained(case: Case) -> tuple[str, ...]:
    """What a step makes gradients of beside x, the scale last."""
    return ("a", "b", "scale") if case.rank else ("delta", "scale")


def _grid_step(made: Built, case: Case, x: Tensor, dy: Tensor, copies: int) -> None:
    args = _grid(case, x)
    base = lk.unpack(args["codes"], case.bits, case.k).float()
    dense = torch.randn(case.n, case.k, device=x.device).to(case.dtype)
    # As ef_qat does: the scales of the other rows learn from a tenth of the tokens.
    tokens = 1.0 if args["rows"] is None else 0.1

    def ours() -> tuple[Tensor, ...]:
        live = {name: args[name].detach().requires_grad_() for name in _trained(case)}
        leaf = x.detach().requires_grad_()
        y = lk.grid_linear(leaf, **{**args, **live}, tokens=tokens)
        return torch.autograd.grad(y, (leaf, *live.values()), dy)

    made.calls["ours"] = [ours]
    made.calls["three cublas"] = [lambda: (torch.nn.functional.linear(x, dense), dy @ dense, dy.t() @ x)]
    made.calls["eager autograd"] = [lambda: _eager_step(case, base, args, x, dy)]
    if x.is_cuda:

        def compiled() -> list[Call]:
            step = torch.compile(lambda: _eager_step(case, base, args, x, dy))
            step()
            return [step]

        optional(made, "torch.compile", compiled)

    def check() -> tuple[float, float]:
        got, rounded = ours(), _eager_step(case, base, args, x, dy)
        exact = _eager_step(case, base, args, x.float(), dy.float())
        sure = len(got) if tokens == 1 else -1  # gradients of drawn tokens are right in the mean only
        return _worst(got[:sure], rounded[:sure], exact[:sure], case.dtype)

    made.check = check


def _binary(made: Built, case: Case, x: Tensor, dy: Tensor, copies: int) -> None:
    groups = lk.group_count(case.k, case.group)
    weights = []
    for _ in range(copies):
        bits = torch.randint(0, 2, (case.bits, case.n, case.k), dtype=torch.uint8, device=x.device)
        alpha = (torch.rand(case.bits, groups, case.n, device=x.device) * 0.02).to(torch.bfloat16)
        weights.append((torch.stack([lk.pack(plane, 1) for plane in bits]), alpha))
    dense = [
        lk.binary_dequantize(p, a, None, case.k, case.group, case.dtype)
        for p, a in weights[: _dense(case, copies)]
    ]
    made.calls["ours"] = [lambda p=p, a=a: lk.binary_matmul(x, p, a, None, case.group) for p, a in weights]
    made.calls["cublas"] = [lambda w=w: torch.nn.functional.linear(x, w) for w in dense]

    def check() -> tuple[float, float]:
        exact = (
            x.double()
            @ lk.binary_dequantize(*weights[0], None, case.k, case.group, torch.float32).double().t()
        )
        return relative(made.calls["ours"][0](), exact), _allowed(
            made.calls["cublas"][0](), exact, case.dtype
        )

    made.check = check


def _quantize(made: Built, case: Case, x: Tensor, dy: Tensor, copies: int) -> None:
    weight = torch.randn(case.n, case.k, device=x.device).to(case.dtype)
    scale = torch.full((lk.group_count(case.k, case.group), case.n), 0.3, device=x.device)
    out = torch.empty_like(weight)
    made.calls["ours"] = [lambda: lk.quantize_pack(weight, scale, None, case.bits, case.group, 0)]
    made.calls["copy"] = [lambda: out.copy_(weight)]

    def check() -> tuple[float, float]:
        want = dispatch.definition("quantize_pack")._init_fn(weight, scale, None, case.bits, case.group, 0)[0]
        got = lk.quantize_pack(weight, scale, None, case.bits, case.group, 0)[0]
        return (got != want).float().mean().item(), 0.0

    made.check = check


def _hadamard(made: Built, case: Case, x: Tensor, dy: Tensor, copies: int) -> None:
    copies_of_x = [x.clone() for _ in range(copies)]
    made.calls["ours"] = [lambda v=v: lk.hadamard(v, -1) for v in copies_of_x]
    made.calls["clone"] = [lambda v=v: v.clone() for v in copies_of_x]

    def check() -> tuple[float, float]:
        reference = dispatch.definition("hadamard")._init_fn
        exact = reference(x.float(), -1)
        return relative(lk.hadamard(x, -1), exact), _allowed(exact.to(case.dtype), exact, case.dtype)

    made.check = check
