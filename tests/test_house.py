"""The house holds itself: small files and functions, floors without circles, one way to import, tests where
the code is.

Every check takes the root of a tree and returns what offends, by name. The tests ask for none in this tree,
and for the right ones in a tree with offenders planted in it. There are no exceptions: who needs one
changes a rule.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import networkx
import pytest

from tests.processes import ROOT, environment

FOLDERS = ("lowbit_ft", "kernels", "benchmarks", "tests")
OURS = ("lowbit_ft", "lowbit_kernels")
FILE_LINES, FUNCTION_LINES, TOP_FILES = 400, 80, 8
# Folders of tests whose subject is not a folder of lowbit_ft.
OTHER_SUBJECTS = ("kernels", "docs", "benchmarks", "configs", "helpers")


# ------------------------------------------------------------------------------------------ the checks


def sources(root: Path, *folders: str) -> dict[str, Path]:
    """Our Python files by their path below root."""
    paths = [path for folder in folders for path in (root / folder).rglob("*.py")]
    return {path.relative_to(root).as_posix(): path for path in sorted(paths)}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def long_files(root: Path) -> list[str]:
    counts = {name: len(path.read_bytes().splitlines()) for name, path in sources(root, *FOLDERS).items()}
    return [
        f"{name}: {count} lines; at most {FILE_LINES}, so split it by topic"
        for name, count in counts.items()
        if count > FILE_LINES
    ]


def long_functions(root: Path) -> list[str]:
    """From `def` to the last line: what stands in decorators, such as a test's table, is not counted."""
    return [
        f"{name}:{node.lineno}: {node.name} has {lines} lines; at most {FUNCTION_LINES}"
        for name, path in sources(root, *FOLDERS).items()
        for node in functions(parsed(path))
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    ]


def with_this_tree(root: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process in which root is the tree that is imported."""
    variables = environment(root, PYTHONDONTWRITEBYTECODE="1", NO_COLOR="1")
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=variables, capture_output=True, text=True
    )


IMPORTS = """
import grimp, json
graph = grimp.build_graph("lowbit_ft", cache_dir=None, exclude_type_checking_imports=True)
print(json.dumps({m: sorted(graph.find_modules_directly_imported_by(m)) for m in graph.modules}))
"""


def circles(root: Path) -> list[str]:
    """Files that import each other, by whatever way; imports inside functions count too."""
    done = with_this_tree(root, IMPORTS)
    assert done.returncode == 0, done.stderr
    graph = networkx.DiGraph(json.loads(done.stdout))
    return [
        f"a circle of imports: {', '.join(sorted(files))}"
        for files in networkx.strongly_connected_components(graph)
        if len(files) > 1
    ]


LINT = (
    "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True, no_logo=True))"
)


def broken_contracts(root: Path) -> list[str]:
    """What `lint-imports` says of the contracts in root's pyproject.toml, when it is not content."""
    done = with_this_tree(root, LINT)
    assert done.returncode == 0 or "broken" in done.stdout or "Missing layer" in done.stdout, done
    return [] if done.returncode == 0 else [done.stdout]


def crowded_top(root: Path) -> list[str]:
    files = sorted(path.name for path in (root / "lowbit_ft").iterdir() if path.is_file())
    too_many = f"lowbit_ft/ has {len(files)} files at its top; at most {TOP_FILES}: {', '.join(files)}"
    return [too_many] if len(files) > TOP_FILES else []


def of_ours(node: ast.Import | ast.ImportFrom) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or (node.module or "").split(".")[0] in OURS
    return any(a.name.split(".")[0] in OURS for a in node.names)


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def comments(path: Path) -> dict[int, str]:
    """The words of comments by line; marks for tools are not words."""
    with path.open("rb") as file:
        found = {t.start[0]: t.string for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT}
    marks = ("noqa", "pyright:", "type:", "pragma:")
    return {
        line: words
        for line, text in found.items()
        if (words := text.lstrip("# ")) and not words.startswith(marks)
    }


def hidden_imports(root: Path) -> list[str]:
    """Imports of our modules inside a function with no comment on their line that says why."""
    out = []
    for name, path in sources(root, "lowbit_ft").items():
        lines = {n.lineno for f in functions(parsed(path)) for n in imports(f) if of_ours(n)}
        out += [
            f"{name}:{line}: an import of ours inside a function; move it up, or say on this line why not"
            for line in sorted(lines - comments(path).keys())
        ]
    return out


def absolute_imports(root: Path) -> list[str]:
    """Imports of lowbit_ft by its full name inside lowbit_ft."""
    out = []
    for name, path in sources(root, "lowbit_ft").items():
        for node in imports(parsed(path)):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                named = [node.module or ""]
            if any(each.split(".")[0] == "lowbit_ft" for each in named):
                out.append(f"{name}:{node.lineno}: {named[0]} is imported by its full name; use dots")
    return out


SPELLED = re.compile(
    r"\b(?:from (lowbit_(?:ft|kernels)[\w.]*) import ([\w, ]*)|import (lowbit_(?:ft|kernels)[\w.]*))"
)


def lost_imports(root: Path) -> list[str]:
    """Imports of what our modules do not have, in code and in the texts of programs that run later."""
    out = []
    for name, path in sources(root, *FOLDERS).items():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for module, names, whole in SPELLED.findall(line):
                wanted = [each.split(" as ")[0].strip() for each in names.split(",")]
                out += [f"{name}:{number}: {what}" for what in missing(root, module or whole, wanted)]
    return out


def missing(root: Path, module: str, names: list[str]) -> list[str]:
    """What is not there of a module and these names of it: a file, a folder, or a word of its text."""
    place = (root / "kernels" if module.startswith("lowbit_kernels") else root) / module.replace(".", "/")
    text = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not text.is_file():
        return [f"{module} is no module"]
    words = set(re.findall(r"\w+", text.read_text(encoding="utf-8")))
    files = {path.stem for path in place.iterdir()} if place.is_dir() else set()
    return [f"{module} has no {name}" for name in names if name and name not in words | files]


def strange_test_folders(root: Path) -> list[str]:
    """Folders with tests of no folder of lowbit_ft."""
    tests = root / "tests"
    inside = {path.parent.relative_to(tests) for path in tests.rglob("*.py")}
    subjects = {part for path in inside for part in (path, *path.parents)} - {Path(".")}
    return [
        f"tests/{path.as_posix()}/ is about lowbit_ft/{path.as_posix()}/, which is no folder"
        for path in sorted(subjects)
        if path.parts[0] not in OTHER_SUBJECTS and not (root / "lowbit_ft" / path).is_dir()
    ]


CHECKS: list[Callable[[Path], list[str]]] = [
    long_files,
    long_functions,
    circles,
    broken_contracts,
    crowded_top,
    hidden_imports,
    absolute_imports,
    lost_imports,
    strange_test_folders,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_holds(check: Callable[[Path], list[str]]) -> None:
    assert all(sources(ROOT, folder) for folder in FOLDERS), (
        "a folder of ours has no files: nothing is checked"
    )
    offenders = check(ROOT)
    assert not offenders, "\n".join(["", *offenders])


# ---------------------------------------------------------------------- each check finds its offender


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_long_files_are_named(tmp_path: Path) -> None:
    names = [f"{folder}/a/{kind}.py" for folder in FOLDERS for kind in ("long", "short")]
    plant(tmp_path, {name: "x = 1\n" * (FILE_LINES + ("long" in name)) for name in names})
    assert long_files(tmp_path) == [
        f"{folder}/a/long.py: 401 lines; at most 400, so split it by topic" for folder in sorted(FOLDERS)
    ]


def test_long_functions_are_named(tmp_path: Path) -> None:
    body = "    x = 1\n" * (FUNCTION_LINES - 1)
    inside = "".join(f"    {line}\n" for line in f"async def deep():\n{body}    x = 2".splitlines())
    text = f"@table(\n    1,\n)\ndef whole():\n{body}\ndef long():\n{body}    x = 2\n\nclass A:\n{inside}"
    plant(tmp_path, {f"{folder}/a.py": text for folder in FOLDERS})
    assert long_functions(tmp_path) == [
        f"{folder}/a.py:{line}: {name} has 81 lines; at most 80"
        for folder in sorted(FOLDERS)
        for line, name in ((85, "long"), (168, "deep"))
    ]


def test_circles_are_named(tmp_path: Path) -> None:
    files = {
        "lowbit_ft/__init__.py": "",
        "lowbit_ft/a.py": "from . import b",
        "lowbit_ft/b.py": "def late():\n    from .c.d import x",
        "lowbit_ft/c/__init__.py": "",
        "lowbit_ft/c/d.py": "from ..a import x",
        "lowbit_ft/e.py": "from typing import TYPE_CHECKING\nfrom . import a\n"
        "if TYPE_CHECKING:\n    from . import f",
        "lowbit_ft/f.py": "from . import e",  # not a circle: the other half is for type checkers
    }
    assert circles(plant(tmp_path, files)) == ["a circle of imports: lowbit_ft.a, lowbit_ft.b, lowbit_ft.c.d"]
    assert circles(plant(tmp_path, {"lowbit_ft/c/d.py": ""})) == []


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of this tree's code and contracts."""
    for name in ("lowbit_ft", "kernels/lowbit_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def test_imports_of_an_upper_floor_are_named(house: Path) -> None:
    files = house / "lowbit_ft" / "files" / "atomic.py"
    files.write_text(files.read_text(encoding="utf-8") + "\n\nfrom ..grid import integer\n", encoding="utf-8")
    (told,) = broken_contracts(house)
    assert "The floors of lowbit_ft BROKEN" in told
    assert "lowbit_ft.files.atomic -> lowbit_ft.grid.integer" in told


def test_a_module_on_no_floor_is_named(house: Path) -> None:
    """The floors are exhaustive: who adds a folder says where it stands."""
    plant(house, {"lowbit_ft/attic/__init__.py": ""})
    (told,) = broken_contracts(house)
    assert "lowbit_ft.attic" in told, told


def test_a_crowded_top_is_named(tmp_path: Path) -> None:
    files = {f"lowbit_ft/{i}.py": "" for i in range(TOP_FILES)} | {"lowbit_ft/folder/x.py": ""}
    assert crowded_top(plant(tmp_path, files)) == []
    assert crowded_top(plant(tmp_path, {"lowbit_ft/notes.md": ""})) == [
        "lowbit_ft/ has 9 files at its top; at most 8: "
        "0.py, 1.py, 2.py, 3.py, 4.py, 5.py, 6.py, 7.py, notes.md"
    ]


def test_hidden_imports_are_named(tmp_path: Path) -> None:
    text = """from . import a
def f():
    import torch
    from . import b
    from .b import c  # slow: it reads a table
    async def g():
        import lowbit_kernels
        from HOUSE import d  # noqa: F401
        import json, lowbit_ft  # the user's own copy
        "# no comment"; from .. import e
"""
    text = text.replace("HOUSE", "lowbit_ft")  # spelled so, it would be an import of this file
    found = hidden_imports(plant(tmp_path, {"lowbit_ft/x.py": text}))
    assert [told.partition(": ")[0] for told in found] == [f"lowbit_ft/x.py:{n}" for n in (4, 7, 8, 10)]


def test_absolute_imports_are_named(tmp_path: Path) -> None:
    text = "import HOUSE.a\nfrom . import a\nimport lowbit_kernels\ndef f():\n    from HOUSE.b import c\n"
    text = text.replace("HOUSE", "lowbit_ft")
    assert absolute_imports(plant(tmp_path, {"lowbit_ft/x.py": text, "tests/test_x.py": text})) == [
        "lowbit_ft/x.py:1: lowbit_ft.a is imported by its full name; use dots",
        "lowbit_ft/x.py:5: lowbit_ft.b is imported by its full name; use dots",
    ]


def test_lost_imports_are_named(tmp_path: Path) -> None:
    lines = [
        "from HOUSE.a import c as b, d, __version__",
        "import HOUSE.a.c, json",
        "from HOUSE.a.c import (",
        "from lowbit_KERNELS import pack",
        "code = 'from HOUSE.e import f'",
        "import HOUSE.a.d",
        "from HOUSE.a import g",
    ]
    text = "\n".join(lines).replace("HOUSE", "lowbit_ft").replace("KERNELS", "kernels")
    files = {"lowbit_ft/a/c.py": "", "lowbit_ft/a/__init__.py": "from .h import d\n__version__ = '1'"}
    files |= {"kernels/lowbit_kernels/__init__.py": "", "tests/x.py": text}
    assert lost_imports(plant(tmp_path, files)) == [
        "tests/x.py:4: lowbit_kernels has no pack",
        "tests/x.py:5: lowbit_ft.e is no module",
        "tests/x.py:6: lowbit_ft.a.d is no module",
        "tests/x.py:7: lowbit_ft.a has no g",
    ]


def test_strange_test_folders_are_named(tmp_path: Path) -> None:
    names = ["test_a", "grid/test_b", "grid/calibrate/test_c", "kernels/aot/test_d", "attic/test_e"]
    files = {f"tests/{name}.py": "" for name in names} | {"lowbit_ft/grid/x.py": ""}
    assert strange_test_folders(plant(tmp_path, files)) == [
        "tests/attic/ is about lowbit_ft/attic/, which is no folder",
        "tests/grid/calibrate/ is about lowbit_ft/grid/calibrate/, which is no folder",
    ]
