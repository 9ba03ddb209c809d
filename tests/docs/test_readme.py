"""The README is checked against the tree: its code runs, its file map is the files, its arithmetic is
recomputed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowbit_ft.train.losses import FLOATS_AT_A_TIME, LOGITS_AT_A_TIME

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["lowbit_ft", "kernels", "benchmarks", "recipes"]  # in the order of the map
README = (ROOT / "README.md").read_text(encoding="utf-8")


def parse_map(readme: str) -> dict[str, str]:
    """The file map: path -> description. A path that ends in "/" is a package and stands for its
    __init__.py.
    """
    block = re.search(r"<!-- map -->\n```text\n(.*?)```", readme, re.DOTALL)
    assert block, "README.md has no file map"
    rows = [line.split(None, 1) for line in block[1].splitlines() if line.strip()]
    return {row[0]: row[1] if len(row) > 1 else "" for row in rows}


def mapped_files() -> list[str]:
    """The files that the map must list: the code, the kernels' page, the benchmarks and the recipes."""
    found = [
        path
        for folder, pattern in (
            ("lowbit_ft", "**/*.py"),
            ("kernels", "**/*.py"),
            ("kernels", "*.md"),
            ("benchmarks", "**/*.py"),
            ("recipes", "*.yaml"),
        )
        for path in (ROOT / folder).glob(pattern)
    ]
    names = [path.relative_to(ROOT).as_posix().removesuffix("__init__.py") for path in found]
    return sorted(names, key=lambda name: (FOLDERS.index(name.split("/")[0]), *name.rpartition("/")))


def table_below(marker: str) -> list[list[str]]:
    """The cells of the Markdown table under this marker, without its head."""
    lines = README.split(f"<!-- {marker} -->\n", 1)[1].splitlines()
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[2:]


def test_the_file_map_is_the_files():
    listed, there = parse_map(README), mapped_files()
    assert len(there) > 40
    assert set(listed) - set(there) == set(), "listed in README.md, but not there"
    assert set(there) - set(listed) == set(), "there, but not listed in README.md: add a line each, sorted"
    assert [name for name, words in listed.items() if not words] == [], "a line without a description"


def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every ```python block, in order, in one namespace, in an empty folder that only has the recipes."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
    folder = tmp_path / "runs" / "from-python"
    assert namespace["folder"].resolve() == (folder / "exported").resolve()
    assert (folder / "report.html").stat().st_size > 10_000
    assert namespace["model"].config.quantization_config is not None


def test_the_memory_arithmetic():
    """Recompute the 8B table from the recipe it talks about and the shapes of Llama 3.1 8B."""
    recipe = yaml.safe_load((ROOT / "recipes" / "llama31-8b-w4-lr-qat.yaml").read_text(encoding="utf-8"))
    quant, train = recipe["quant"], recipe["train"]
    rank, length = recipe["adapter"]["rank"], recipe["data"]["sequence_len"] * train["micro_batch_size"]
    blocks, width, mlp, kv, vocabulary = 32, 4096, 14336, 8 * 128, 128256
    linears = [
        (width, width),
        (kv, width),
        (kv, width),
        (width, width),
        (mlp, width),
        (mlp, width),
        (width, mlp),
    ]
    weights = blocks * sum(n * k for n, k in linears)
    low_rank = blocks * sum(rank * (n + k) for n, k in linears)
    scales = weights / quant["group_size"]
    assert train["gradient_checkpointing"] is True
    assert f"{weights / 1e9:.3f}e9" in README and f"({low_rank / 1e6:.1f}e6 + {scales / 1e6:.1f}e6)" in README

    parts = [
        weights * (quant["bits"] + quant["residual_bits"]) / 8,
        scales * 2,
        2 * vocabulary * width * 2,
        (low_rank + scales) * 16,
        blocks * length * width * 2,
        LOGITS_AT_A_TIME * 4 + FLOATS_AT_A_TIME * 12,
    ]
    rows = table_below("memory")
    assert [row[2] for row in rows] == [f"{part / 1e9:.2f}" for part in [*parts, sum(parts)]]
    shipped = weights * quant["bits"] / 8 + parts[1] + parts[2]
    assert f"halve to {parts[0] / 2e9:.2f} GB" in README and f"\nembeddings: {shipped / 1e9:.2f} GB" in README


def test_the_tables_of_the_readme_are_the_tables_of_the_code():
    from lowbit_ft.adapters import ADAPTERS
    from lowbit_ft.export import EXPORTERS
    from lowbit_ft.grid.calibrate import CALIBRATORS

    def first_cells(heading: str) -> list[str]:
        section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
        return re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE)

    assert first_cells("Methods") == list(ADAPTERS)
    assert sorted(first_cells("Formats")) == sorted(EXPORTERS)
    for name in CALIBRATORS:
        assert f"`{name}`" in README, name


def test_the_commands_of_the_readme_exist():
    from typer.main import get_command

    from lowbit_ft.cli.main import app

    listed = {row[0].strip("`") for row in table_below("commands")}
    assert listed == set(get_command(app).commands)  # type: ignore[attr-defined]


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^ {4}make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
