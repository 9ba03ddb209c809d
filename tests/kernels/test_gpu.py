"""The kernels on a real GPU: sizes of real layers, 16-bit inputs, determinism, streams, graphs, more than
2^31 weights.

    pytest -m gpu tests/kernels/test_gpu.py

Errors are judged against float64 and allowed 1.5 times the error of the same computation in torch with
equally rounded inputs.
"""

import importlib

import lowbit_kernels as lk
import pytest
import torch
from lowbit_kernels import dispatch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = [1, 7, 16, 17, 100, 600, 2049]
GRIDS = [
    (4, 128, "symmetric"),
    (4, 32, "float"),
    (3, 64, "integer"),
    (2, 32, "float"),
    (8, -1, "integer"),
    (2, 256, "float"),
]


def reference(op: str, *args):
    return dispatch.definition(op)._init_fn(*args)


def weights(bits: int, n: int, k: int, g: int, kind: str = "symmetric") -> tuple:
    """codes, scale, zero, offset on the GPU; every code present; kind: symmetric, integer or float zeros with
    an offset.
    """
    groups = (lk.group_count(k, g), n)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device="cuda")
    codes.view(-1)[: 1 << bits] = torch.arange(1 << bits, device="cuda").to(torch.uint8)
    scale = ((torch.rand(groups, device="cuda") + 0.5) * 0.02).bfloat16()
    zero = offset = None
    if kind == "integer":
        zero = torch.randint(0, 1 << bits, groups, device="cuda").to(torch.uint8)
    if kind == "float":
        zero, offset = (
            torch.rand(groups, device="cuda") * (1 << bits),
            torch.randn(groups, device="cuda") * 0.01,
        )
    return lk.pack(codes, bits), scale, zero, offset


def error(got: Tensor, want: Tensor) -> float:
    assert got.isfinite().all()
    return ((got.double() - want).norm() / want.norm()).item()


def good(got: Tensor, torch_got: Tensor, exact: Tensor, floor: float = 1e-6) -> None:
    assert got.shape == exact.shape
    allowed = 1.5 * error(torch_got, exact) + floor
    assert error(got, exact) <= allowed, (error(got, exact), allowed)


@pytest.fixture(autouse=True)
def full_precision():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)


def test_the_kernels_are_used():
    assert dispatch.launcher("packed_matmul") is not None, (
        "Triton is missing: these tests would test the reference"
    )


@pytest.mark.parametrize("m", [1, 5, 16, 40, 700])
@pytest.mark.parametrize(
    ("q", "g", "offset"), [(1, 128, False), (3, 128, True), (4, 64, False), (2, -1, True)]
)
def test_binary(m, q, g, offset):
    n, k = 577, 1100
    groups = lk.group_count(k, g)
    planes = torch.stack(
        [lk.pack(torch.randint(0, 2, (n, k), dtype=torch.uint8, device="cuda"), 1) for _ in range(q)]
    )
    alpha = (torch.rand(q, groups, n, device="cuda") * 0.02).bfloat16()
    t = (torch.randn(groups, n, device="cuda") * 0.01).bfloat16() if offset else None
    x, dy = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(m, n, device="cuda").bfloat16()
    dense = reference("binary_dequantize", planes, alpha, t, k, g, torch.float32).double()
    good(
        lk.binary_matmul(x, planes, alpha, t, g),
        reference("binary_matmul", x, planes, alpha, t, g),
        x.double() @ dense.t(),
    )
    good(
        lk.binary_matmul_dx(dy, planes, alpha, t, k, g),
        reference("binary_matmul_dx", dy, planes, alpha, t, k, g),
        dy.double() @ dense,
    )
    exact = reference("binary_gradients", x.double().float(), dy.float(), planes, g, q)
    for got, rounded, want in zip(
        lk.binary_gradients(x, dy, planes, g, q),
        reference("binary_gradients", x, dy, planes, g, q),
        exact,
        strict=True,
    ):
        good(got, rounded, want.double())


def grid_arguments(bits: int, n: int, k: int, g: int, units: str, rank: int = 64) -> dict:
    codes, scale, zero, _ = weights(bits, n, k, g, "integer")
    return {
        "codes": codes,
        "residual": lk.pack(torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda"), 4),
        "scale0": scale,
        "zero0": zero,
        "a": torch.randn(rank, k, device="cuda"),
        "b": torch.randn(n, rank, device="cuda") * 0.05,
        "delta": None,
        "rows": None,
        "scale": scale.float(),
        "zero": zero.float(),
        "offset": None,
        "mask": None,
        "gain": 0.5,
        "units": units,
        "bits": bits,
        "residual_bits": 4,
        "lowest": 0,
    }


@pytest.mark.parametrize("units", ["grid", "weight", "live"])
@pytest.mark.parametrize(("bits", "g"), [(4, 128), (3, 64), (2, -1), (6, 128)])
def test_codes_are_the_reference_s_and_do_not_depend_on_the_call(units, bits, g):
    n, k = 1024, 4096
    args = grid_arguments(bits, n, k, g, units)
    got = lk.grid_codes(**args, in_features=k, group_size=g)
    want = reference("grid_codes", *args.values(), k, g)
    # D is a sum in another order than cuBLAS's: a value on a tie may fall the other way, by one code, once in
    # a million.
    a, b = lk.unpack(got, bits, k).int(), lk.unpack(want, bits, k).int()
    assert (a - b).abs().max() <= 1 and (a != b).float().mean() < 1e-4
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(got, lk.grid_codes(**args, in_features=k, group_size=g))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        again = lk.grid_codes(**args, in_features=k, group_size=g)
    side.synchronize()
    assert torch.equal(got, again)


@pytest.mark.parametrize("m", [16, 300, 2048])
@pytest.mark.parametrize("units", ["grid", "live"])
def test_grid_gradients(m, units):
    n, k, g = 512, 1100, 64
    args = {**grid_arguments(4, n, k, g, units), "group_size": g, "clip_first": False}
    x, dy = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(m, n, device="cuda").bfloat16()
    exact = reference("grid_gradients", x.float(), dy.float(), *args.values())
    rounded = reference("grid_gradients", x, dy, *args.values())
    for got, torch_got, want in zip(lk.grid_gradients(x, dy, **args), rounded, exact, strict=True):
        good(got, torch_got, want.double())


def mask_of(n: int, k: int) -> Tensor:
    return lk.pack((torch.rand(n, k, device="cuda") < 0.5).to(torch.uint8), 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize(("bits", "g"), [(4, 128), (3, 64), (2, -1), (6, 128)])
def test_a_dense_part(bits, g, some, masked):
    """Codes bit for bit, gradients as good as the reference's, the same in every run, in a graph too."""
    n, k, m = 1024, 1100, 300
    args = grid_arguments(bits, n, k, g, "grid")
    rows = torch.randperm(n, device="cuda")[:208].sort().values if some else None
    delta = torch.randn(n if rows is None else len(rows), k, device="cuda") * 2
    args |= {"a": None, "b": None, "delta": delta, "rows": rows, "mask": mask_of(n, k) if masked else None}
    got = lk.grid_codes(**args, in_features=k, group_size=g)
    assert torch.equal(got, reference("grid_codes", *args.values(), k, g))
    x, dy = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(m, n, device="cuda").bfloat16()
    rest = (*args.values(), g, False)
    made = lk.grid_row_gradients(x, dy, *rest)
    rounded = reference("grid_row_gradients", x, dy, *rest)
    exact = reference("grid_row_gradients", x.float(), dy.float(), *rest)
    for value, torch_value, want in zip(made, rounded, exact, strict=True):
        good(value, torch_value, want.double())
    for value, again in zip(made, lk.grid_row_gradients(x, dy, *rest), strict=True):
        assert torch.equal(value, again)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = lk.grid_codes(**args, in_features=k, group_size=g)
    codes.zero_()
    graph.replay()
    assert torch.equal(codes, got)


@pytest.mark.parametrize("m", [16, 300])
@pytest.mark.parametrize(("units", "rank"), [("grid", 64), ("weight", 16), ("live", 64)])
def test_masked_weights(units, rank, m):
    n, k, g = 512, 1100, 64
    args = grid_arguments(4, n, k, g, units, rank) | {"mask": mask_of(n, k)}
    zeros = lk.unpack(args["mask"], 1, k).bool()
    codes = lk.unpack(lk.grid_codes(**args, in_features=k, group_size=g), 4, k)
    points = args["zero"].t().repeat_interleave(g, 1)[:, :k].to(torch.uint8)
    assert torch.equal(codes[zeros], points[zeros])
    x, dy = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(m, n, device="cuda").bfloat16()
    rest = (*args.values(), g, False)
    exact = reference("grid_gradients", x.float(), dy.float(), *rest)
    rounded = reference("grid_gradients", x, dy, *rest)
    for got, torch_got, want in zip(lk.grid_gradients(x, dy, *rest), rounded, exact, strict=True):
        good(got, torch_got, want.double())


@pytest.mark.parametrize("low_rank", ["factorised", "corrected"])
@pytest.mark.parametrize("units", ["grid", "live"])
def test_grid_estimates_and_no_wait_for_the_device(units, low_rank):
    """All tokens against fp32 of the same equations; a share of them without a host synchronization."""
    n, k, g, m = 512, 1100, 64, 300
    args = {**grid_arguments(4, n, k, g, units, rank=16), "group_size": g, "clip_first": False}
    x, dy = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(m, n, device="cuda").bfloat16()
    codes = lk.grid_codes(
        **{a: v for a, v in args.items() if a not in ("group_size", "clip_first")},
        in_features=k,
        group_size=g,
    )
    exact = lk.grid_estimates(x.float(), dy.float(), None, codes, *args.values(), low_rank, 1.0, True, True)
    got = lk.grid_estimates(x, dy, None, codes, *args.values(), low_rank, 1.0, True, True)
    assert all((a - b).norm() < 1e-2 * b.norm() for a, b in zip(got, exact, strict=True))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = lk.grid_estimates(x, dy, None, codes, *args.values(), low_rank, 0.25, True, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(t.isfinite().all() for t in drawn)


@pytest.mark.parametrize("residual_bits", [0, 4])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_quantize_and_pack(bits, residual_bits):
    weight = torch.randn(577, 1100, device="cuda").bfloat16()
    scale = torch.rand(lk.group_count(1100, 128), 577, device="cuda") + 0.2
    got = lk.quantize_pack(weight, scale, None, bits, 128, residual_bits)
    want = reference("quantize_pack", weight, scale, None, bits, 128, residual_bits)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "block"), [(4096, -1), (14336, -1), (576, -1), (8192, 128), (11008, -1)]
)
def test_hadamard(dtype, channels, block):
    x = torch.randn(100, channels, device="cuda").to(dtype)
    exact = reference("hadamard", x.float(), block).double()
    # Tensor cores cut their sums off instead of rounding them: about 1.3e-6 over 11008 channels.
    good(lk.hadamard(x, block), exact.to(dtype), exact, 4e-6)


@pytest.mark.parametrize("m", [1, 16, 64, 1500])
def test_five_runs_give_the_same_bits(m):
    w = weights(4, 4096, 4096, 128)
    x = torch.randn(m, 4096, device="cuda").bfloat16()
    first = lk.packed_matmul(x, *w, 4, 128)
    for _ in range(4):
        assert torch.equal(first, lk.packed_matmul(x, *w, 4, 128))


@pytest.mark.parametrize("m", [1, 16])
def test_inside_a_cuda_graph(m):
    w = weights(4, 4096, 4096, 128)
    x = torch.randn(m, 4096, device="cuda").bfloat16()
    want = lk.packed_matmul(x, *w, 4, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = lk.packed_matmul(x, *w, 4, 128)
    for _ in range(3):
        got.fill_(torch.nan)
        graph.replay()
        assert torch.equal(got, want)


def test_two_streams_at_once():
    """Split sums share counters: two streams must not share the same ones, and none may start before they are
    zero.
    """
    importlib.import_module("lowbit_kernels.counters").drop_counters()
    w, x = weights(4, 4096, 4096, 128), torch.randn(1, 4096, device="cuda").bfloat16()
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results: list[Tensor] = []
    for i in range(40):
        with torch.cuda.stream(streams[i % 4]):
            results.append(lk.packed_matmul(x, *w, 4, 128))
    torch.cuda.synchronize()
    want = lk.packed_matmul(x, *w, 4, 128)
    assert all(torch.equal(want, got) for got in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_on_a_device_that_is_not_the_current_one():
    w = [None if t is None else t.to("cuda:1") for t in weights(4, 512, 1024, 128)]
    x = torch.randn(3, 1024, device="cuda:1").bfloat16()
    assert torch.cuda.current_device() == 0
    good(
        lk.packed_matmul(x, *w, 4, 128),
        reference("packed_matmul", x, *w, 4, 128),
        x.double() @ reference("dequantize", *w, 4, 1024, 128, torch.float32).double().t(),
    )


def test_compiled_whole():
    w = weights(4, 512, 1024, 128)
    x = torch.randn(33, 1024, device="cuda").bfloat16()
    step = torch.compile(lambda v: lk.hadamard(lk.packed_matmul(v, *w, 4, 128), -1) * 2, fullgraph=True)
    torch.testing.assert_close(step(x), lk.hadamard(lk.packed_matmul(x, *w, 4, 128), -1) * 2)


def test_more_half_words_than_an_int32_counts():
    """N * W = 2^31 + 2^22 half-words, N * K twice that: the last rows lie beyond every 32-bit offset."""
    bits, k, last = 8, 1 << 15, 256
    n = (1 << 17) + last
    free = torch.cuda.mem_get_info()[0]
    if free < 16 << 30:
        pytest.skip(f"needs 16 GB of GPU memory, {free / 2**30:.1f} GB are free")
    codes = torch.zeros(n, lk.packed_width(k, bits), dtype=torch.int16, device="cuda")
    tail = torch.randint(0, 256, (last, k), dtype=torch.uint8, device="cuda")
    codes[-last:] = lk.pack(tail, bits)
    scale = torch.full((1, n), 0.01, device="cuda").bfloat16()
    part = (codes[-last:].contiguous(), scale[:, -last:].contiguous(), None, None)
    dense = reference("dequantize", *part, bits, k, -1, torch.float32).double()
    for m in (1, 64, 700):
        x = torch.randn(m, k, device="cuda").bfloat16()
        got = lk.packed_matmul(x, codes, scale, None, None, bits, -1)[:, -last:]
        good(got, reference("packed_matmul", x, *part, bits, -1), x.double() @ dense.t())
        dy = torch.zeros(m, n, device="cuda", dtype=torch.bfloat16)
        dy[:, -last:] = torch.randn(m, last, device="cuda")
        got = lk.packed_matmul_dx(dy, codes, scale, None, None, bits, k, -1)
        few = dy[:, -last:].contiguous()
        good(got, reference("packed_matmul_dx", few, *part, bits, k, -1), few.double() @ dense)
    assert torch.equal(lk.unpack(codes, bits, k)[-last:], tail)
    weight = lk.dequantize(codes, scale, None, None, bits, k, -1, torch.bfloat16)
    assert torch.equal(weight[-last:], dense.to(torch.bfloat16))


# The most kernels, hence the longest to compile: last, so that a run that is cut off has seen everything
# else.
@pytest.mark.parametrize(
    ("n", "k", "bits", "g", "kind", "dtype", "rows"),
    [
        *((1024, 4096, *grid, torch.bfloat16, ROWS) for grid in GRIDS),
        *((577, 1100, *grid, torch.bfloat16, [1, 16, 100, 600]) for grid in GRIDS),
        *((577, 1100, *grid, torch.float16, [1, 100]) for grid in GRIDS[:3]),
        *((577, 1100, *grid, torch.float32, [7]) for grid in GRIDS[:3]),
        (1, 1100, 4, 128, "integer", torch.bfloat16, [1, 100]),
    ],
)
def test_matmul_and_dx(n, k, bits, g, kind, dtype, rows):
    w = weights(bits, n, k, g, kind)
    dense = reference("dequantize", *w, bits, k, g, torch.float32).double()
    for m in rows:
        x, dy = torch.randn(m, k, device="cuda").to(dtype), torch.randn(m, n, device="cuda").to(dtype)
        good(
            lk.packed_matmul(x, *w, bits, g),
            reference("packed_matmul", x, *w, bits, g),
            x.double() @ dense.t(),
        )
        good(
            lk.packed_matmul_dx(dy, *w, bits, k, g),
            reference("packed_matmul_dx", dy, *w, bits, k, g),
            dy.double() @ dense,
        )
