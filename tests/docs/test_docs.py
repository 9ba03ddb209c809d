"""The pages of docs/: generated tables are what their script makes, code runs, error texts are the
program's.
"""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks import format_table
from lowbit_ft import pipeline
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.export import EXPORTERS
from lowbit_ft.integrations.adapter_files import PEFT_TYPE
from lowbit_ft.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_the_format_tables_are_what_the_exporters_say() -> None:
    text = page("choosing-a-format.md")
    assert format_table.render(text) == text, "run: python -m benchmarks.format_table"
    for name in EXPORTERS:
        assert text.count(f"| `{name}` |") == 2, name
    assert set(EXPORTERS) <= set(format_table.RUNTIMES)


def test_a_cell_is_a_question_to_reject() -> None:
    """One row by hand, against the exporter."""
    exporter = EXPORTERS["compressed-tensors"]
    assert format_table.groups_of(exporter, 4, True) == "all"
    narrow = type(
        "Narrow",
        (),
        {
            "reject": lambda self, grid: None if grid.group_size == 64 else "no",
            "reject_width": lambda self, grid, k: None,
        },
    )
    assert format_table.groups_of(narrow(), 4, True) == "64"  # pyright: ignore
    nothing = type(
        "Nothing", (), {"reject": lambda self, grid: "no", "reject_width": lambda self, grid, k: None}
    )
    assert format_table.groups_of(nothing(), 4, True) == "-"  # pyright: ignore


@cache
def templates() -> list[str]:
    """Every text of the package, with "..." where a value is put in."""
    found = []
    for path in (ROOT / "lowbit_ft").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {
            id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                found.append(node.value)
    return found


def error_keys() -> list[str]:
    return re.findall(r"^### `(.+)`$", page("faq.md").partition("## Said by other programs")[0], re.MULTILINE)


@pytest.mark.parametrize("key", error_keys())
def test_an_error_text_of_the_faq_is_in_the_code(key: str) -> None:
    assert len(key) >= 10
    assert any(key in template for template in templates()), f"no message of the package reads so: {key}"


def test_the_faq_has_error_texts_and_others_say_theirs() -> None:
    assert len(error_keys()) >= 30 and len(set(error_keys())) == len(error_keys())
    missing_file, unknown_type = re.findall(
        r"^### `(.+)`$", page("faq.md").partition("## Said by other programs")[2], re.MULTILINE
    )
    # transformers' words around a file name of ours; PEFT's KeyError of our type
    assert any(missing_file.rpartition("... ")[2] in template for template in templates())
    assert unknown_type == f"KeyError: {PEFT_TYPE!r}"


def test_every_method_and_every_key_named_exists() -> None:
    text = page("choosing-a-method.md")
    rows = re.findall(r"^\| `([\w-]+)` \|", text.partition("## How they differ")[2], re.MULTILINE)
    assert rows == list(ADAPTERS)
    sections = load_recipe(ROOT / "recipes" / "quickstart.yaml", check=False).model_dump()
    keys: dict[str, set[str]] = {
        name: set(value) for name, value in sections.items() if isinstance(value, dict)
    }
    keys["adapter"] = {field for config in ADAPTERS.values() for field in config.model_fields}
    named = 0
    for name in DOCS.glob("*.md"):
        for section, key in re.findall(
            r"`(model|quant|adapter|data|train|eval|export)\.(?!py`)([a-z_]+)",
            name.read_text(encoding="utf-8"),
        ):
            assert key in keys[section], f"{name.name}: {section}.{key}"
            named += 1
    assert named > 25


def test_every_command_of_ours_exists() -> None:
    from typer.main import get_command

    from lowbit_ft.cli.main import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    used = {
        name
        for path in DOCS.glob("*.md")
        for name in re.findall(r"lowbit-ft ([a-z-]+)", path.read_text(encoding="utf-8"))
    }
    assert used and used <= known


def test_the_table_of_long_sequences_is_what_was_counted() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "long_step.json").read_text())["rows"]
    cells = re.findall(
        r"\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        page("long-context.md").partition("<!-- long -->")[2],
        re.MULTILINE,
    )
    counted = [(row["blocks_gb"], row["away_gb"], row["total_gb"]) for row in rows if row["tokens"] == 65536]
    assert len(cells) == len(counted) == 3
    for told, found in zip(cells, counted, strict=True):
        assert [float(x) for x in told] == [round(x, 1) for x in found]


def test_files_that_are_named_exist() -> None:
    """Files of ours, in the pages and in the text of the code, as a path or as a bare name.py. Not in
    LOG.md and CHANGELOG.md: they tell what was.
    """
    homes = (ROOT, ROOT / "lowbit_ft", ROOT / "kernels")
    folders = "|".join(path.name for home in homes for path in home.iterdir() if path.is_dir())
    as_path = re.compile(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\.(?:py|md|sh|ya?ml|json)\b")
    scripts = {
        path.name for folder in (*homes[1:], ROOT / "benchmarks", DOCS) for path in folder.rglob("*.py")
    }
    scripts |= {path.name for path in (ROOT / "tests").rglob("*.py")} | {
        "convert_hf_to_gguf.py"
    }  # llama.cpp's
    pages = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"]
    code = [p for top in ("lowbit_ft", "kernels", "benchmarks", "docs") for p in (ROOT / top).rglob("*.py")]
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    # its recipes write files that are to come
    to_come = re.findall(r"^# (lowbit_ft/\S+\.py)$", contributing, re.MULTILINE)
    assert len(to_come) >= 10 and not any((ROOT / name).exists() for name in to_come)
    named, missing = 0, []
    for path in [*pages, *code]:
        text = path.read_text(encoding="utf-8")
        for name in to_come if path.name == "CONTRIBUTING.md" else []:
            text = text.replace(name, "").replace(Path(name).name, "")
        for found in as_path.findall(text):
            named += 1
            if not any((home / found).exists() for home in (*homes, path.parent)):
                missing.append(f"{path.relative_to(ROOT)}: {found}")
        for found in re.findall(r"(?<![\w/.*<>-])[a-z]\w*\.py\b", text):
            named += 1
            if found not in scripts:
                missing.append(f"{path.relative_to(ROOT)}: {found}")
    assert named > 200 and missing == []


def test_links_lead_somewhere() -> None:
    links = [
        (path, link)
        for path in [*DOCS.glob("*.md"), ROOT / "README.md"]
        for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", path.read_text(encoding="utf-8"))
    ]
    local = [(path, link) for path, link in links if not link.startswith("http")]
    assert len(local) >= 6
    assert [f"{path.name}: {link}" for path, link in local if not (path.parent / link).exists()] == []


def test_the_python_of_the_serving_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    short = [
        "train.max_steps=1",
        "train.micro_batch_size=1",
        "data.train.limit=20",
        "data.valid.limit=10",
        "data.sequence_len=256",
        "eval.perplexity=false",
        "eval.generate=[]",
        "train.eval_every=null",
    ]
    pipeline.run(load_recipe("recipes/quickstart.yaml", [*short, f"output={tmp_path / 'RUN'}"]))
    blocks = re.findall(r"<!-- run -->\n\n```python\n(.*?)```", page("serving.md"), re.DOTALL)
    assert len(blocks) == 4 and page("serving.md").count("```python") == 4
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks, 1):
        namespace = {"__name__": "docs"}
        exec(compile(block, f"serving.md, block {number}", "exec"), namespace)
    assert (tmp_path / "my-adapter" / "adapter_config.json").exists()
    assert not hasattr(namespace["deployed"], "peft_config")  # the plain model is left
    assert isinstance(pipeline.generate(tmp_path / "RUN", "Write", 2), str)


BOXES, FUNCTIONS = "recipes/assets/boxes", "recipes/assets/functions"
PRINTED = {  # page and a line of its block -> what stands for the reader's own files, and for other sections
    ("object-detection.md", "path: PekingU/rtdetr_r50vd"): (
        "model.path=recipes/assets/tiny-rtdetr",
        f"data={{train: {{path: {BOXES}/train.parquet}}, valid: {{path: {BOXES}/valid.parquet}}}}",
        "adapter={method: lr_qat}",
        "train={max_steps: 2}",
    ),
    ("tasks.md", "task: {kind: sequence_classification, labels: [negative, positive]}"): (
        "model.path=recipes/assets/tiny-bert",
        "task.labels=[function, method]",
        f"data.train.path={FUNCTIONS}/train.jsonl",
        f"data.valid.path={FUNCTIONS}/valid.jsonl",
    ),
    ("tasks.md", "teacher: path/to/fine-tuned"): (
        "model={path: recipes/assets/tiny-bert, dtype: float32}",
        "task={kind: sequence_classification, labels: [function, method]}",
        f"data.train={{path: {FUNCTIONS}/train.jsonl}}",
        "train.teacher=recipes/assets/tiny-bert",
        "train.max_steps=2",
    ),
}


@pytest.mark.parametrize(("name", "line"), PRINTED)
def test_a_printed_recipe_of_a_task_is_one(
    name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the defaults of what it leaves out: two were refused for the format that they did not name."""
    monkeypatch.chdir(ROOT)
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", page(name), re.S) if line in b]
    (tmp_path / "printed.yaml").write_text(block)
    load_recipe(tmp_path / "printed.yaml", ["name=printed", *PRINTED[name, line], f"output={tmp_path / 'o'}"])
