"""What the benchmark measures: ops, shapes and numbers of rows. bench_build.py makes them."""

from dataclasses import dataclass
from typing import Any

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
    packed. rows: how many rows a dense part is of, n for all of them; masked: half of the weights are
    held at zero.
    """

    op: str
    bits: int
    m: int
    n: int
    k: int
    group: int = 128
    rank: int = 0
    rows: int = 0
    masked: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        more = f" r{self.rank}" * bool(self.rank) + f" rows{self.rows}" * bool(self.rows)
        more += " mask" * self.masked
        return (
            f"{self.op} {self.bits}b g{self.group}{more} M{self.m} {self.n}x{self.k} "
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
            "row_gradients": self.rows / self.n,
            "grid_step": 2 + self.rows / self.n if self.rows else 3,
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
            return 2 * packed + 4.0 * self.rank * (self.n + self.k) + 4.0 * self.rows * self.k
        if self.op == "row_gradients":  # of its rows alone; D is read, dD written
            share = self.rows / self.n
            return packed * share + 8.0 * self.rows * self.k + 2.0 * self.m * (self.rows + self.k)
        if self.op in ("quantize_pack", "dequantize"):
            return packed + 2.0 * self.n * self.k
        return packed + 2.0 * self.m * (self.n + self.k)


def targets() -> list[Case]:
    """The cases the targets of the design name, the most telling first."""
    big = (14336, 4096)
    out = [Case(op="packed_matmul", bits=b, m=1, n=big[0], k=big[1]) for b in (4, 2, 3, 6)]
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
    return out + dense_and_masked()


def dense_and_masked() -> list[Case]:
    """Full QAT, EfQAT of a tenth of the rows, and low rank over a mask: their codes, gradients and steps.
    The design promises no figure for them.
    """
    size: dict[str, Any] = {"bits": 4, "n": 4096, "k": 4096}
    return [
        Case(op="grid_step", m=4096, rows=4096, **size),
        Case(op="grid_step", m=4096, rows=416, **size),
        Case(op="grid_step", m=4096, rank=64, masked=True, **size),
        Case(op="grid_codes", m=1, rows=4096, **size),
        Case(op="row_gradients", m=4096, rows=4096, **size),
    ]


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
    # The tiles of grid_codes are asked for by rank: one case decides them.
    return [*parts, *(case for case in targets() if case.op not in ("grid_step", "grid_codes"))]


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
            rows=16 if c.rows == c.n else min(c.rows, 8),
            masked=c.masked,
            dtype=torch.float32,
        )
        for c in cases
    }
    return sorted(small, key=lambda c: c.name)
