"""Names that would bite: whose `kernels` is imported, where our packages come from, and what importing them
does.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_kernels_folder_is_not_a_package():
    """With an __init__.py it would shadow the `kernels` package of Hugging Face for everybody who has
    ours.
    """
    assert not (ROOT / "kernels" / "__init__.py").exists()
    found = importlib.util.find_spec("kernels")
    assert found is None or found.origin is None or not Path(found.origin).is_relative_to(ROOT)


@pytest.mark.parametrize("name", ["lowbit_ft", "lowbit_kernels"])
def test_our_packages_are_the_ones_of_this_tree(name: str):
    found = importlib.util.find_spec(name)
    assert found and found.origin and Path(found.origin).resolve().is_relative_to(ROOT)


def test_recipes_are_files_not_a_package():
    assert list((ROOT / "recipes").glob("*.yaml"))
    assert not list((ROOT / "recipes").rglob("*.py"))


@pytest.mark.parametrize("name", ["lowbit_ft", "lowbit_kernels", "lowbit_ft.cli.main"])
def test_importing_has_no_side_effect(name: str, tmp_path: Path):
    """In a new process with an empty home: no CUDA start, no Triton, no drawing library, no file, no changed
    variable.
    """
    code = f"""
import json, os, sys, threading
before = dict(os.environ)
import {name}
import torch
print(json.dumps({{
    "loaded": sorted({{"triton", "matplotlib", "wandb", "tensorboard", "pytest"}} & set(sys.modules)),
    "cuda": torch.cuda.is_initialized(),
    "default": str(torch.get_default_dtype()),
    "threads": threading.active_count(),
    "environment": sorted(key for key in before.keys() ^ os.environ.keys()
                          if key.startswith(("LOWBIT", "HF_", "TRITON", "CUDA", "PYTORCH", "TRANSFORMERS"))),
}}))
"""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    drop = ("HF_", "XDG_", "MPL", "TRITON", "TORCH", "COV_", "COVERAGE")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    environment |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    assert facts == {"loaded": [], "cuda": False, "default": "torch.float32", "threads": 1, "environment": []}
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_kernels_import_nothing_of_ours():
    """Torch, triton, the standard library and relative imports only: the folder can be published as it is."""
    allowed = {"torch", "triton", "__future__", *sys.stdlib_module_names}
    files = list((ROOT / "kernels" / "lowbit_kernels").rglob("*.py"))
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_every_dependency_and_test_tool_is_pinned_where_it_was_tested():
    """constraints.txt names an exact version for each direct requirement of the runtime, and of the dev and
    trackers extras.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    canonical = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, pinned = line.partition("==")
            assert re.fullmatch(r"[\w.]+", pinned), line
            canonical[re.sub(r"[-_.]+", "-", name).lower()] = pinned
    extras = project["optional-dependencies"]
    for requirement in project["dependencies"] + extras["dev"] + extras["trackers"]:
        name = re.sub(r"[-_.]+", "-", re.split(r"[><=;\[ ]", requirement)[0]).lower()
        assert name in canonical, f"{name} is not in constraints.txt"
    # What trackio 0.43 asks for; the earlier ones want an older hub (huggingface-hub<2).
    assert canonical["trackio"] == "0.43.0" and int(canonical["pillow"].split(".")[0]) < 13
    assert int(canonical["huggingface-hub"].split(".")[0]) >= 2
    assert canonical["torch"] == "2.13.0"
    assert version("torch").split("+")[0] == canonical["torch"]


def test_no_text_of_ours_loads_pickles_or_remote_code():
    """Safetensors and JSON only, and no key anywhere that runs a model's own code."""
    banned = re.compile(
        r"torch\.(load|save)\(|\b(import|from) "
        r"c?pickle|weights_only=False|shell=True|yaml\.load\(|trust_remote_code=True"
    )
    files = [p for folder in ("lowbit_ft", "kernels", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    found = [
        f"{p.relative_to(ROOT)}: {hit[0]}"
        for p in files
        if (hit := banned.search(p.read_text(encoding="utf-8")))
    ]
    assert found == []
