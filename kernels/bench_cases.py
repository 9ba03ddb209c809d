"""What the benchmark measures: ops, shapes and numbers of rows. bench_build.py makes them."""

from dataclasses import dataclass

import lowbit_kernels as lk
import torch

SHAPES = {  # N x K of the linears the targets are about
    "llama3-8b": [(4096, 4096), (14336, 4096), (4096, 14336)],
    "qwen-32b": [(5120, 5120), (27648, 5120), (5120, 27648)],
}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the results. bits counts sign planes for the binary ops and is 16 where nothing is
    packed.
    """

    op: str
    bits: int
    m: int
    n: int
    k: int
    group: int = 128
    rank: int = 0
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        rank = f" r{self.rank}" if self.rank else ""
        return (
            f"{self.op} {self.bits}b g{self.group}{rank} M{self.m} {self.n}x{self.k} "
            f"{str(self.dtype).removeprefix('torch.')}"
        )

    @property
    def small(self) -> bool:
        """So short that Python's time to launch would be measured: timed inside a CUDA graph."""
        return self.m <= 512 or self.op == "hadamard"

    def flops(self) -> float:
        products = {
            "packed_matmul": 1,
            "packed_matmul_dx": 1,
            "binary_matmul": 1,
            "scale_gradient": 1,
            "grid_step": 3,
        }
        return 2.0 * products.get(self.op, 0) * self.m * self.n * self.k

    def moved(self) -> float:
        """Bytes that must cross the memory bus once: packed weight, scales, activations."""
        if self.op == "hadamard":
            return 4.0 * self.m * self.k
        packed = 2.0 * self.n * lk.packed_width(self.k, 1 if self.op == "binary_matmul" else self.bits)
        if self.op == "binary_matmul":
            packed *= self.bits
        packed += 2.0 * self.n * lk.group_count(self.k, self.group)
        if self.op == "grid_codes":
            return 2 * packed + 4.0 * self.rank * (self.n + self.k)
        if self.op in ("quantize_pack", "dequantize"):
            return packed + 2.0 * self.n * self.k
        return packed + 2.0 * self.m * (self.n + self.k)


def targets() -> list[Case]:
    """The cases the targets of the design name, the most telling first."""
    big = (14336, 4096)
    out = [Case(op="packed_matmul", bits=b, m=1, n=big[0], k=big[1]) for b in (4, 2, 3)]
    out += [Case(op="packed_matmul", bits=4, m=m, n=big[0], k=big[1]) for m in (16, 4096, 64, 256)]
    out += [
        Case(op="packed_matmul_dx", bits=4, m=4096, n=big[0], k=big[1]),
        Case(op="packed_matmul", bits=4, m=1, n=4096, k=4096),
    ]
    out.append(Case(op="grid_step", bits=4, m=4096, n=4096, k=4096, rank=64))
    out.append(Case(op="scale_gradient", bits=4, m=4096, n=4096, k=4096))
    out.append(Case(op="binary_matmul", bits=3, m=1, n=big[0], k=big[1]))
    out += [
        Case(op="quantize_pack", bits=4, m=1, n=big[0], k=big[1]),
        Case(op="hadamard", bits=16, m=4096, n=1, k=4096, group=-1),
    ]
    return out


def tuned() -> list[Case]:
    """The cases whose tile sizes bench_tune.py searches: the targets, and the ops that are parts of
    others.
    """
    parts = [Case(op="grid_codes", bits=4, m=1, n=4096, k=4096, rank=64)]
    parts += [Case(op="scale_gradient", bits=4, m=4096, n=4096, k=4096, rank=64)]
    parts += [
        Case(op="dequantize", bits=4, m=1, n=14336, k=4096),
        Case(op="packed_matmul_dx", bits=4, m=256, n=14336, k=4096),
    ]
    return [*parts, *(case for case in targets() if case.op != "grid_step")]


def everything() -> list[Case]:
    """Targets first, then every shape and number of rows."""
    out = [*targets(), *tuned()]
    for shapes in SHAPES.values():
        for n, k in shapes:
            for m in TOKENS:
                out += [Case(op=op, bits=4, m=m, n=n, k=k) for op in ("packed_matmul", "packed_matmul_dx")]
    for m in (1024, 256):
        out.append(Case(op="grid_step", bits=4, m=m, n=4096, k=4096, rank=64))
    out += [Case(op="hadamard", bits=16, m=4096, n=1, k=d, group=-1) for d in (1024, 8192, 14336)]
    return list(dict.fromkeys(out))


def tiny(cases: list[Case]) -> list[Case]:
    """The same kinds at sizes a CPU does at once, for the dry run."""
    small = {
        Case(
            op=c.op,
            bits=c.bits,
            m=min(c.m, 4),
            n=16,
            k=64,
            group=32 if c.group != -1 else -1,
            rank=min(c.rank, 2),
            dtype=torch.float32,
        )
        for c in cases
    }
    return sorted(small, key=lambda c: c.name)
