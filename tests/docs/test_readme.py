"""The README and the pages about the house are checked against the tree: their code runs, the map is the
files, the picture is the imports, the arithmetic is recomputed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import draw_house, write_pages
from lowbit_ft.model.heads import LOGITS_AT_A_TIME
from lowbit_ft.signals.tokens import FLOATS_AT_A_TIME

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEMORY = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


def table_below(page: str, marker: str) -> list[list[str]]:
    """The cells of the Markdown table under this marker, without its head."""
    lines = page.split(f"<!-- {marker} -->\n", 1)[1].lstrip("\n").splitlines()
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[2:]


def test_the_readme_is_short_and_in_its_order() -> None:
    # But for the rows that benchmarks/peers_table.py writes.
    written, tables, after = re.split(r"<!-- /?quality -->", README)
    assert len((written + after).splitlines()) <= 190 and len(tables.splitlines()) <= 60
    assert re.findall(r"^## (.+)$", README, re.MULTILINE) == [
        "Why it is different",
        "Two commands",
        "A real run",
        "Methods",
        "Quality",
        "Formats",
        "From Python",
        "Limits",
        "Where to read on",
        "License",
    ]


def test_every_page_is_reached_from_the_readme() -> None:
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert len(pages) > 8
    assert pages - set(re.findall(r"\]\(([^)#]+)", README.split("## Where to read on")[1])) == set()


def test_the_map_and_the_commands_are_what_the_tree_says() -> None:
    pages = write_pages.pages()
    assert len(pages) == 2
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, "run: make docs"


def test_the_map_lists_every_file_once() -> None:
    """The map, read back from the page, against the disk."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("<!-- map -->")[1]
    listed = [
        heading + name
        for heading, part in re.findall(r"^### `([^`]+)`\n(.*?)(?=^###|\Z)", page, re.MULTILINE | re.DOTALL)
        for name in re.findall(r"^\| `([^`]+)` \| .{10,}\|$", part, re.MULTILINE)
    ]
    folders = [("lowbit_ft", "*.py"), ("kernels", "*.py"), ("benchmarks", "*.py"), ("docs", "*.py")]
    there = {
        path.relative_to(ROOT).as_posix() for folder, kind in folders for path in (ROOT / folder).rglob(kind)
    } | {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").glob("*.yaml")}
    assert len(there) > 100 and len(listed) == len(set(listed))
    assert set(listed) == {path for path in there if not path.endswith("/__init__.py")}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("One. Two.", "One"),
        ("The law (arXiv 2406.06385, Eq. 8).\n\nMore.", "The law (arXiv 2406.06385, Eq. 8)"),
        ("merge: what\nthe adapters trained.\nIt is", "merge: what the adapters trained"),
        ("train.mlp_chunk: norms in e.g. two parts:\n\n    x", "train.mlp_chunk: norms in e.g. two parts"),
        ("Which one? `this` one.", "Which one? `this` one"),
        ("", ""),
    ],
)
def test_a_file_is_described_by_its_first_sentence(text: str, sentence: str) -> None:
    assert write_pages.first_sentence(text) == sentence


def test_a_mute_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mute.py").write_text("x = 1\n")
    (tmp_path / "mute.yaml").write_text("x: 1\n")
    monkeypatch.setattr(write_pages, "ROOT", tmp_path)
    for name in ("mute.py", "mute.yaml"):
        with pytest.raises(ValueError, match=f"{name} does not say what it is"):
            write_pages.sentence_of(tmp_path / name)


def test_the_picture_of_the_house_is_the_house() -> None:
    assert draw_house.PICTURE.read_text(encoding="utf-8") == draw_house.draw(), "run: make docs"


def test_the_picture_has_every_folder_and_its_imports() -> None:
    """Against the disk, and against two imports that can be read in the code."""
    picture = draw_house.PICTURE.read_text(encoding="utf-8")
    rooms = [r for floor in draw_house.house() for r in floor]
    there = {path.name for path in (ROOT / "lowbit_ft").iterdir() if (path / "__init__.py").exists()}
    there |= {path.stem for path in (ROOT / "lowbit_ft").glob("*.py") if not path.stem.startswith("__")}
    assert {r.module.rpartition(".")[2] for r in rooms} == there | {"lowbit_kernels"}
    assert picture.count('class="box"') == len(rooms) and all(f">{r.label}</text>" in picture for r in rooms)
    assert "cli/ imports recipe/" in picture and "grid/ imports lowbit_kernels/" in picture
    assert "report/ imports train/" not in picture and "imports that go up" not in picture


def test_sizes_in_the_picture_are_hundreds() -> None:
    assert [draw_house.hundreds(n) for n in (1, 100, 101, 1849)] == [100, 100, 200, 1900]


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
    assert f"{weights / 1e9:.3f}e9" in MEMORY and f"({low_rank / 1e6:.1f}e6 + {scales / 1e6:.1f}e6)" in MEMORY
    assert train["optimizer"] == "paged_adamw8bit"  # its moments are paged, so they are not in the table

    parts = [
        weights * (quant["bits"] + quant["residual_bits"]) / 8,
        scales * 2,
        2 * vocabulary * width * 2,
        (low_rank + scales) * 8,
        blocks * length * width * 2,
        LOGITS_AT_A_TIME * 4 + FLOATS_AT_A_TIME * 12,
    ]
    rows = table_below(MEMORY, "memory")
    assert [row[2] for row in rows] == [f"{part / 1e9:.2f}" for part in [*parts, sum(parts)]]
    shipped = weights * quant["bits"] / 8 + parts[1] + parts[2]
    words = " ".join(MEMORY.split())
    assert f"halve to {parts[0] / 2e9:.2f} GB" in words
    assert f"bf16 embeddings: {shipped / 1e9:.2f} GB" in words
    assert f"shipped model is {shipped / 1e9:.2f} GB" in " ".join(README.split())


def test_the_memory_of_the_real_run_is_what_plan_predicts() -> None:
    from benchmarks.plan_targets import predicted

    made, words = predicted("llama31_8b", []), " ".join(README.split())
    assert f"training step peaks at {made.stages['training'] / 1e9:.2f} GB, CUDA context included" in words
    assert f"evaluation at the end at {made.stages['evaluation at the end'] / 1e9:.2f} GB" in words
    assert f"comes to {(made.stages['training'] - made.parts['context']) / 1e9:.2f})" in MEMORY


def test_the_quality_tables_of_the_readme_are_those_of_the_rows() -> None:
    from benchmarks import peers_table

    stored = json.loads(peers_table.RESULTS.read_text(encoding="utf-8"))
    for block, path in peers_table.PAGES.items():
        page = path.read_text(encoding="utf-8")
        assert peers_table.render(block, page, stored) == page, "run: python -m benchmarks.peers_table"
    assert stored["rows"] and all(row["contender"] in README for row in stored["rows"])


def test_the_table_of_methods_is_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # scripts import their neighbours
    from benchmarks import quality

    rows = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["rows"]
    quality.print_table(rows)
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "choosing-a-method.md").read_text(encoding="utf-8")
    assert printed.count("\n") > 8 and printed.strip() in page


def test_the_number_of_architectures_is_that_of_the_table() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| ([a-z][^|]*?) \|", page, re.MULTILINE)
    tried = {name.removesuffix(", the rest") for name in names}
    assert f"{len(tried - {'model_type'})} architectures" in README


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


def test_the_table_of_commands_is_all_of_them():
    from typer.main import get_command

    from lowbit_ft.cli.main import app

    rows = table_below((ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), "commands")
    assert {row[0].strip("`") for row in rows} == set(get_command(app).commands)  # type: ignore[attr-defined]
    assert all(len(row[1]) > 10 for row in rows)


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^ {4}make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
