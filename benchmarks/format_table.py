"""Write the tables of docs/choosing-a-format.md: which grids each format holds, asked of the exporters' own
`reject`.

    python -m benchmarks.format_table

Run it after a change of an exporter; tests/docs/test_docs.py fails while the page says something else.
"""

from __future__ import annotations

import textwrap
from itertools import product
from pathlib import Path

from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.base import Exporter
from lowbit_ft.files.atomic import write_text
from lowbit_ft.grid import BinaryGrid, IntGrid

PAGE = Path(__file__).resolve().parent.parent / "docs" / "choosing-a-format.md"
BITS, GROUPS = (2, 3, 4, 6, 8), (32, 64, 128, 256, -1)
WIDTH = 1024  # inputs of the layer that reject_width is asked about; a multiple of every group size

# What runs a folder of the format. "tested" says what our own tests load it with; the rest is said by the
# projects themselves.
RUNTIMES = {
    "native": ("transformers after `import lowbit_ft`, packed in memory", "transformers"),
    "compressed-tensors": ("transformers, vLLM, SGLang", "transformers"),
    "int-quantized": ("W8A8 only: vLLM (GPU and CPU), SGLang, transformers", "transformers"),
    "gguf": ("llama.cpp, Ollama, transformers (`gguf_file=`)", "transformers"),
    "gptq": ("vLLM, SGLang, ExLlama, transformers with gptqmodel", "transformers with gptqmodel"),
    "gptq_v2": ("vLLM, transformers with gptqmodel", "transformers with gptqmodel"),
    "awq": ("vLLM, SGLang, transformers with gptqmodel", "transformers with gptqmodel"),
    "mlx": ("mlx-lm and LM Studio on Apple silicon", "mlx-lm"),
    "onnx": ("ONNX Runtime, Optimum, any device it has kernels for", "ONNX Runtime on a CPU"),
    "torchao": ("torch.export and ExecuTorch, transformers with torchao", "transformers with torchao"),
}


def holds(exporter: Exporter, grid: IntGrid | BinaryGrid) -> bool:
    return exporter.reject(grid) is None and exporter.reject_width(grid, WIDTH) is None


def groups_of(exporter: Exporter, bits: int, symmetric: bool) -> str:
    """The group sizes at which a format holds these bits, "all" for every one, "-" for none."""
    sizes = [
        g
        for g in GROUPS
        if holds(exporter, IntGrid(bits=bits, group_size=g, symmetric=symmetric, residual_bits=0))
    ]
    if len(sizes) == len(GROUPS):
        return "all"
    return ", ".join("row" if g == -1 else str(g) for g in sizes) or "-"


def grid_table() -> list[str]:
    head = [f"{bits} {kind}" for bits, kind in product(BITS, ("sym", "asym"))]
    rows = [
        "| `export.format` | "
        + " | ".join(head)
        + " | binary planes (2 and more) | float offset | float16 scales |"
    ]
    rows.append("| --- |" + " --- |" * (len(head) + 3))
    for name, exporter in EXPORTERS.items():
        cells = [groups_of(exporter, bits, symmetric) for bits, symmetric in product(BITS, (True, False))]
        planes = holds(exporter, BinaryGrid(bits=2))
        offset = exporter.reject(IntGrid(residual_bits=0), offset=True) is None
        half = IntGrid(residual_bits=0, scale_dtype="float16")
        kept = [
            d
            for d in ("bfloat16", "float16", "float32")
            if holds(exporter, half) and exporter.reject_dtype(half, d) is None
        ]
        scales = "yes" if len(kept) == 3 else f"in {' and '.join(kept)} models" if kept else "no"
        rows.append(
            f"| `{name}` | "
            + " | ".join([*cells, "yes" if planes else "no", "yes" if offset else "no", scales])
            + " |"
        )
    return rows


def runtime_table() -> list[str]:
    rows = ["| `export.format` | runs in | our tests load it with | start it |", "| --- | --- | --- | --- |"]
    for name, exporter in EXPORTERS.items():
        runs, tested = RUNTIMES[name]
        rows.append(f"| `{name}` | {runs} | {tested} | `{exporter.serve('FOLDER')}` |")
    return rows


def reasons() -> list[str]:
    """Every way out that a format names, once."""
    rows = []
    for name, exporter in EXPORTERS.items():
        found = dict.fromkeys(
            reason.replace("\n", " ")
            for bits, symmetric, size in product(BITS, (True, False), GROUPS)
            for grid in [IntGrid(bits=bits, group_size=size, symmetric=symmetric, residual_bits=0)]
            for reason in (
                exporter.reject(grid),
                exporter.reject_width(grid, WIDTH),
                exporter.reject(grid, offset=True),
            )
            if reason
        )
        if reason := exporter.reject(BinaryGrid(bits=2)):
            found[reason] = None
        for reason in found:
            item = f"- `{name}`: {reason}"
            rows += textwrap.wrap(item, 120, subsequent_indent="  ", break_on_hyphens=False)
    return rows


BLOCKS = {"grids": grid_table, "runtimes": runtime_table, "reasons": reasons}


def render(page: str) -> str:
    """The page with its generated blocks made anew: from "<!-- name -->" to "<!-- /name -->"."""
    for name, make in BLOCKS.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found, rest = page.partition(start)
        assert found and end in rest, f"{PAGE.name} has no block {name}"
        page = f"{before}{start}\n" + "\n".join(make()) + f"\n\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    write_text(PAGE, render(PAGE.read_text(encoding="utf-8")))
    print(f"wrote {PAGE}")
