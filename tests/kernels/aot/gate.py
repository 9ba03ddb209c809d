"""Compile shipped kernels for GPUs that are not here, and read what the compiler made of them.

`triton.compile` needs no driver: it runs ptxas and gives a cubin. From its SASS (NVIDIA's machine code,
disassembled with the cuobjdump that comes with Triton) we take what decides speed and what a source review
cannot see:

    registers, stack     STACK > 0 is a spill
    shared memory        compilation does not fail above the limit of an architecture; the launch would
    hot loop             the innermost loop with the most tensor-core instructions, in instructions per weight
                         and thread

A module gives what it ships as aot_cases(): (name, jit function, signature, constexprs, options, weights that
one program handles per iteration of its hot loop, or None). Pointers and sizes are declared divisible by 16,
as in a real launch: without that the loads are scalar and the SASS is not what will run.

Results are cached by a hash of everything they depend on: the kernels' sources, the case, the architecture,
the versions.

    python -m tests.kernels.aot.gate            the table of every case and architecture, as Markdown
"""

import argparse
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lowbit_kernels

ARCHITECTURES = (80, 86, 89, 90, 120)
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376}
MODULES = (
    "matmul_cases_triton",
    "codes_triton",
    "gradients_cases_triton",
    "grid_rows_triton",
    "pack_triton",
    "binary_cases_triton",
    "hadamard_triton",
)
TENSOR_CORE = ("HMMA", "HGMMA")
CACHE = Path(os.environ.get("LOWBIT_AOT_CACHE", ".pytest_cache/lowbit_aot"))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shipped configuration of one kernel."""

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    weights: int | None
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What came out. loop counts SASS instructions of the hot loop per thread, 0 without a loop."""

    registers: int
    stack: int
    shared: int
    total: int
    loop: int
    tensor: int
    register_a: bool  # HGMMA takes its first operand from registers
    per_weight: float | None


def cases() -> list[Case]:
    """Every aot_cases() of the package. The tuples may have a seventh field: the architectures a case is
    for.
    """
    found = []
    for name in MODULES:
        module = importlib.import_module(f"lowbit_kernels.{name}")
        for case, function, signature, constants, options, weights, *only in module.aot_cases():
            extra = {"architectures": tuple(only[0])} if only else {}
            found.append(
                Case(
                    name=case,
                    function=function,
                    signature=signature,
                    constants=constants,
                    options=options,
                    weights=weights,
                    **extra,
                )
            )
    names = [(case.name, arch) for case in found for arch in case.architectures]
    assert len(names) == len(set(names)), (
        f"two cases of one name: {sorted(n for n in names if names.count(n) > 1)}"
    )
    return found


@functools.cache
def _sources() -> str:
    """A hash of the files that hold kernels and what they are made of, and of what compiles them. Tiles are
    in the case itself.
    """
    import triton

    digest = hashlib.sha256(f"{triton.__version__} {sys.version_info[:2]}".encode())
    folder = Path(lowbit_kernels.__file__).parent
    for path in [*sorted(folder.glob("*_triton.py")), folder / "triton_common.py", folder / "layout.py"]:
        digest.update(path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def _tool(*arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _opcode(instruction: str) -> str:
    found = re.match(r"(?:@!?U?P\w+ )?([A-Z0-9]+)", instruction)
    return found.group(1) if found else ""


def hot_loop(sass: str) -> tuple[list[str], list[str]]:
    """(all instructions, those of the loop with the most tensor-core instructions; the shortest of equals,
    since an outer loop holds its inner one). Loops are backward branches."""
    code = [
        (int(address, 16), text)
        for address, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    ]
    loops = []
    for address, text in code:
        target = re.search(r"\bBRA(?:\.U)?\S*\s+(?:!?U?P\w+, )*`?\(?(0x[0-9a-f]+)", text)
        # A branch to itself is the trap at a kernel's end.
        if target and int(target.group(1), 16) < address:
            body = [t for a, t in code if int(target.group(1), 16) <= a <= address]
            loops.append((sum(_opcode(t) in TENSOR_CORE for t in body), -len(body), body))
    return [text for _, text in code], max(loops, default=(0, 0, []), key=lambda loop: loop[:2])[2]


def compile_case(case: Case, arch: int) -> Compiled:
    """Compile one case for one architecture, or return what an earlier run with the same sources measured."""
    description = json.dumps(
        [
            _sources(),
            case.name,
            case.signature,
            {k: str(v) for k, v in case.constants.items()},
            case.options,
            case.weights,
            arch,
        ],
        sort_keys=True,
    )
    path = CACHE / f"{hashlib.sha256(description.encode()).hexdigest()}.json"
    if path.is_file():
        return Compiled(**json.loads(path.read_text(encoding="utf-8")))

    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.function.arg_names)
    # Arguments that are not named in the signature are constants; sizes that are really 1 stay plain
    # integers.
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = [
        i
        for i, name in enumerate(names)
        if signature[name].startswith("*") or signature[name] in ("i32", "i64")
    ]
    source = ASTSource(
        fn=case.function,
        signature=signature,
        constexprs={name: value for name, value in case.constants.items() if name in names},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    kernel = triton_compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, sass = _tool("--dump-resource-usage", str(cubin)), _tool("-sass", str(cubin))
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources is not None, f"no resource usage in {usage!r}"
    code, loop = hot_loop(sass)
    threads = 32 * case.options.get("num_warps", 4)
    result = Compiled(
        registers=int(resources.group(1)),
        stack=int(resources.group(2)),
        shared=kernel.metadata.shared,
        total=len(code),
        loop=len(loop),
        tensor=sum(_opcode(text) in TENSOR_CORE for text in loop or code),
        # HGMMA D, A, B: a descriptor is written gdesc[UR..], a register operand R..
        register_a=any(re.search(r"HGMMA\S+ R\d+, R\d+", text) for text in loop),
        per_weight=len(loop) * threads / case.weights if case.weights and loop else None,
    )
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False, encoding="utf-8") as file:
        json.dump(asdict(result), file)
    os.replace(file.name, path)
    return result


def table(rows: list[tuple[Case, int, Compiled]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| kernel | sm | registers | spill B | shared B | hot loop | tensor-core | per weight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, arch, got in rows:
        weight = "" if got.per_weight is None else f"{got.per_weight:.2f}"
        cells = (case.name, arch, got.registers, got.stack, got.shared, got.loop, got.tensor, weight)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES))
    options = parser.parse_args()
    rows = []
    for case in cases():
        if options.only in case.name:
            for arch in options.arch:
                if arch in case.architectures:
                    rows.append((case, arch, compile_case(case, arch)))
    print(table(rows))


if __name__ == "__main__":
    main()
