"""The gate: every shipped kernel compiles for every supported GPU, within its budget. No GPU needed.

By default the cases with a budget, on two architectures; with LOWBIT_AOT=all every case on all five (about
five minutes, and what a change of a kernel must pass).
"""

import os
from dataclasses import replace

import pytest

pytest.importorskip("triton")
from tests.kernels.aot.gate import (  # noqa: E402
    ARCHITECTURES,
    SHARED_LIMIT,
    Case,
    cases,
    compile_case,
    hot_loop,
)

ALL = os.environ.get("LOWBIT_AOT") == "all"
# Instructions per weight of a thread's hot loop, by the beginning of a case's name. Where a number comes
# from: the lane-instructions an H200 can issue per weight at its full memory bandwidth are 4.0 at 4 bits, 3.2
# at 3 and 2.1 at 2.
BUDGETS = {
    "decode 4-bit bf16 scale bf16 g128": 2.6,
    "decode 4-bit fp16 scale bf16 g128": 2.3,
    "decode 2-bit bf16 scale bf16 g128": 2.2,
    "decode 3-bit bf16 scale bf16 g128": 2.8,
    "binary-decode-q1-g128-m8": 1.9,
    "binary-decode-q2-g128-m8": 3.2,
    "binary-decode-q3-g128-m8": 4.9,
    "binary-decode-q4-g128-m8": 6.2,
}
# On an H200 smaller tiles, which spend more instructions, were faster at the targets: what they take, and not
# more.
SM90_BUDGETS = {
    "fused 4-bit bf16 scale bf16 g128": 4.2,
    "decode 4-bit bf16 scale bf16 g128 M16": 3.6,
    "decode 2-bit bf16 scale bf16 g128 M16": 2.9,
    "decode 3-bit bf16 scale bf16 g128 M16": 5.0,
}


def budget(case: Case, arch: int) -> float | None:
    table = [*(SM90_BUDGETS.items() if arch == 90 else ()), *BUDGETS.items()]  # the first that fits
    return next((limit for prefix, limit in table if case.name.startswith(prefix)), None)


def chosen() -> list[tuple[Case, int]]:
    pairs = [(case, arch) for case in cases() for arch in ARCHITECTURES if arch in case.architectures]
    if ALL:
        return pairs
    short = [(case, arch) for case, arch in pairs if arch in (80, 90) and budget(case, arch) is not None]
    return [
        pair for pair in short if pair[1] == 90 or pair[0].name.startswith("decode 4-bit bf16 scale bf16")
    ]


@pytest.mark.slow
@pytest.mark.no_cover  # what compiles kernels is Python too, and counting slows it down
@pytest.mark.parametrize(("case", "arch"), [pytest.param(c, a, id=f"{c.name}-sm{a}") for c, a in chosen()])
def test_compiles_within_budget(case: Case, arch: int):
    got = compile_case(case, arch)
    assert got.stack == 0, f"{got.stack} bytes of registers spilled to memory ({got.registers} registers)"
    assert got.shared <= SHARED_LIMIT[arch], (
        f"{got.shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}"
    )
    # Products of fp32 inputs need not use tensor cores, and the scale gradient alone (rank 0, chunked) and
    # the codes of a dense part are no products at all.
    kinds = ("decode", "fused", "dx", "hadamard", "grid-codes", "binary-gradients")
    if case.name.startswith(kinds) and not case.name.endswith("-fp32") and "delta" not in case.name:
        assert got.tensor > 0, "no tensor-core instruction"
    limit = budget(case, arch)
    if limit is not None:
        assert got.per_weight is not None, (
            "no hot loop found, or the case does not say how many weights it handles"
        )
        assert got.per_weight <= limit, f"{got.per_weight:.2f} instructions per weight, budget {limit}"


def ones() -> list[Case]:
    """One case per kernel, with every size the launcher may find to be 1 as the constant that Triton's
    just-in-time compiler then makes of it: a single row of x, a single output, one group per row. The
    declared integers of the other cases never are."""
    found = {}
    for case in cases():
        free = {p.name for p in case.function.params if not p.do_not_specialize}
        sizes = [
            name
            for name in ("M", "N", "groups", "rows", "count", "moved")
            if case.signature.get(name) == "i32" and name in free
        ]
        whole_row = case.constants.get("GROUP") == 0
        key = (case.function.__name__, whole_row)
        if sizes and key not in found:
            signature = {name: kind for name, kind in case.signature.items() if name not in sizes}
            found[key] = replace(
                case,
                signature=signature,
                constants=case.constants | dict.fromkeys(sizes, 1),
                name=f"{case.name} ones",
            )
    return list(found.values())


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in ones()])
def test_compiles_where_sizes_are_one(case: Case):
    assert compile_case(case, case.architectures[-1]).total > 0


def test_every_budget_has_a_case():
    names = [case.name for case in cases()]
    for prefix in {**BUDGETS, **SM90_BUDGETS}:
        assert any(name.startswith(prefix) for name in names), (
            f"no shipped case is called {prefix}...: {names}"
        )


def test_hot_loop_of_a_listing():
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LOP3.LUT R2, R1, 0xf, RZ, 0xc0 ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R2, R3, R4 ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0050*/               @P1 BRA 0x0 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70 ;
"""
    code, loop = hot_loop(listing)
    assert len(code) == 8
    assert [text.split()[0] for text in loop] == ["LOP3.LUT", "HMMA.16816.F32.BF16", "@!P0"]
