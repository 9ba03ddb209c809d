"""One choice is one file: for every family table, the member that CONTRIBUTING.md writes down is put into the
table by its one line, and the whole line runs with it.

The code is read from that page, so prose and test cannot drift. A table that has no recipe there, or no row
here, fails; so does a recipe whose table is gone.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowbit_ft import pipeline
from lowbit_ft.cli.main import app
from lowbit_ft.recipe.recipe import load_recipe, recipe_schema
from lowbit_ft.recipe.yaml import RecipeError
from tests.family_rows import ROWS, Run

ROOT = Path(__file__).resolve().parents[1]
# Literal tables that are no choice of a recipe, each with the reason.
NO_FAMILY = {
    "sparsity.patterns.PATTERNS": "shapes that zeros may have, for one key of the members of SPARSITY",
    "grid.packed.WEIGHTS": "what a kind of grid is made of: a grid of a known kind needs no line there",
    "vector_codes.VECTOR_CODES": "config.json of a model chooses; tests/vector_codes/ takes every member",
    "cli.import_rules.SHARED": "keys of transformers' trainer, not members",
    "diffusion.traits.TRAITS": "what diffusers calls its models: config.json chooses",
    "diffusion.paths.TIMES": "two densities of a line each, for one key of one member",
    "diffusion.paths.PATHS": "two ways to noise, for one key of one member",
    "export.card.MAKER": "what the hub's pipelines take, not members",
    "model.purpose.EXAMPLES": "what models are called with, by their auto class",
    "activations.calibrate.RANGES": "five rules of a few lines each for the static scale of a kind",
    "gradients.directions.DISTRIBUTIONS": "densities of a line each, for two keys of two members",
    "adapters.lora_start.PLAIN": "what a LoRA file may say, not members",
    "rotations.families.FAMILIES": "what architectures look like; no recipe chooses one",
    "rotations.modulation.MODULATED": "the same, of transformers of diffusers",
    "adapters.rates.RATES": "numbers for members of ADAPTERS; those without take one",
    "adapters.rates.PAPERS": "the same, of a paper",
    "signals.intervention.MODES": "orders of three places, for one key of one member",
    "signals.dpo.DPO_LOSSES": "losses of a line each, for one key of one member",
    "signals.reference.REFERENCES": "two ways to ask one teacher, for one key of one member",
    "data.synthesis.priors.PRIORS": "two losses of an image, for one key of one member",
    "integrations.lora_names.WITHOUT_EFFECT": "what LoraConfig may say, not members",
}


# ------------------------------------------------------------------------------------------------ the tables


@functools.cache
def tables() -> dict[str, str]:
    """Every literal table `NAME: dict[str, ...] = {...}` of the package: its name -> its module, below
    lowbit_ft."""
    found, package = {}, ROOT / "lowbit_ft"
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            name, kind = node.target.id, ast.unparse(node.annotation)
            literal = re.fullmatch(r"[A-Z][A-Z_]*", name) and kind.startswith("dict[str, ")
            if literal and f"{module}.{name}" not in NO_FAMILY:
                found[name] = module
    return found


@dataclass(frozen=True)
class Member:
    """A recipe of CONTRIBUTING.md: the module its file is, its code, and its line in the table."""

    module: str
    code: str
    table: str
    key: str
    value: str

    def put(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Into its table, as if its file were there."""
        module = types.ModuleType(self.module)
        module.__package__ = self.module.rpartition(".")[0]
        monkeypatch.setitem(sys.modules, self.module, module)
        exec(compile(self.code, f"{self.module} of CONTRIBUTING.md", "exec"), module.__dict__)
        home = importlib.import_module(f"lowbit_ft.{tables()[self.table]}")
        value = eval(self.value, vars(home) | vars(module))
        monkeypatch.setitem(getattr(home, self.table), self.key, value)


@functools.cache
def members() -> dict[str, Member]:
    """Table -> the member that CONTRIBUTING.md adds to it."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.compile(
        r"```python\n# (?P<file>lowbit_ft/\S+)\.py\n(?P<code>.*?)```\n\n"
        r"One line in `(?P<table>[A-Z]+)` of `(?P<home>\S+)\.py`:\s`\"(?P<key>\w+)\": (?P<value>.+?)`\.\n",
        re.DOTALL,
    )
    found = {}
    for match in block.finditer(page):
        home = match["home"].removesuffix("/__init__").removeprefix("lowbit_ft/").replace("/", ".")
        assert tables().get(match["table"]) == home, f"CONTRIBUTING.md: {match['table']} is not in {home}"
        found[match["table"]] = Member(
            match["file"].replace("/", "."), match["code"], match["table"], match["key"], match["value"]
        )
    assert len(found) == page.count("```python"), "a block of CONTRIBUTING.md is not followed by its line"
    return found


def test_every_table_has_members_a_recipe_and_a_row() -> None:
    assert tables(), "no table was found"
    for name, module in tables().items():
        assert getattr(importlib.import_module(f"lowbit_ft.{module}"), name), f"{name} is empty"
    assert set(tables()) == set(members()) == set(ROWS)
    for name in NO_FAMILY:
        module, _, table = name.rpartition(".")
        assert hasattr(importlib.import_module(f"lowbit_ft.{module}"), table), f"{name} is gone"


# ------------------------------------------------------------------------------------------------ the line


@pytest.mark.no_cover  # the whole line again, whose lines are counted in tests/test_pipeline.py
@pytest.mark.parametrize("table", ROWS)
def test_one_file_and_one_line_are_enough(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Key, error, schema, plan, training, merge, export read back by its reader, report and card."""
    row, member = ROWS[table], members()[table]
    name = row.word or member.key
    assert not row.schema or f'"{name}"' not in json.dumps(recipe_schema())
    member.put(monkeypatch)

    with pytest.raises(RecipeError) as error:
        load_recipe(row.write(tmp_path, f"{name}x"))
    assert f"did you mean '{name}'?" in str(error.value) and str(error.value).count(name) > 2

    file = row.write(tmp_path, name)
    assert not row.schema or f'"{name}"' in json.dumps(recipe_schema())
    planned = CliRunner().invoke(app, ["plan", str(file)])
    assert planned.exit_code == 0 and name in planned.output, planned.output

    recipe = load_recipe(file)
    shipped = pipeline.run(recipe)
    run = Run(recipe, tmp_path / "run", shipped)
    assert "equal bit for bit" in capsys.readouterr().out, "the export was not read back"
    for path in (run.folder / "recipe.yaml", run.folder / "report.html", shipped / "README.md"):
        assert name in path.read_text(encoding="utf-8"), path
    assert load_recipe(run.folder / "recipe.yaml") == recipe
    row.shows(run)
