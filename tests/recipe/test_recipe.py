"""The recipe as a whole: the file, the overrides, the order of the problems, the schema."""

import json
import os
import time
from pathlib import Path

import pytest

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.recipe.recipe import load_recipe, recipe_schema
from lowbit_ft.recipe.yaml import RecipeError
from tests.recipe.recipe_text import (
    GOOD,
    bad_recipes,
    refused,
    refused_with,
    write,
)

BAD = [
    # (what, changed text, overrides, place and words that must be in one line)
    ("unknown section", ("data:\n", "dta:\n"), (), "r.yaml:12: dta: unknown key; did you mean 'data'?"),
    (
        "duplicate key",
        ("bits: 4", "bits: 4\n  bits: 3"),
        (),
        "r.yaml:8: quant.bits: got the key twice (first on line 7); keep one",
    ),
    ("tag", ("bits: 4", "bits: !!python/name:os.system"), (), "r.yaml:7: quant.bits: got the tag"),
    ("merge key", ("bits: 4", "<<: {bits: 4}"), (), "r.yaml:7: quant: got '<<'; merge keys are not allowed"),
    ("name with a slash", ("name: test", "name: a/b"), (), "r.yaml:1: name: got 'a/b'; allowed: "),
    ("override unknown", ("", ""), ("train.lr=3",), "override 'train.lr=3': train.lr: unknown key"),
    (
        "override without value",
        ("", ""),
        ("train.max_steps",),
        "override 'train.max_steps': got no key.path=value",
    ),
    (
        "override not YAML",
        ("", ""),
        ("train.betas=[",),
        "override 'train.betas=[': got '[', which is not YAML",
    ),
    (
        "override with a comment",  # a folder called so would be another one
        ("", ""),
        ("output=runs/try #2",),
        "override 'output=runs/try #2': got '#2', which is a comment in YAML",
    ),
    ("override of a comment", ("", ""), ("name=#2",), "override 'name=#2': got '#2', which is a comment"),
    (
        "override through a value",
        ("", ""),
        ("name.x=3",),
        "override 'name.x=3': name is 'test', a value without keys",
    ),
    (
        "override beyond a list",
        ("", ""),
        ("quant.exclude=[a]", "quant.exclude.4=b"),
        "override 'quant.exclude.4=b': quant.exclude is a list: got index '4'; allowed 0..0",
    ),
    (
        "override of a wrong value",
        ("", ""),
        ("quant.bits=7",),
        "override 'quant.bits=7': quant.bits: got 7; allowed: 2, 3, 4, 6, 8; the nearest is 6",
    ),
]


@bad_recipes(BAD)
def test_bad_recipe_is_refused_with_its_line(change, overrides, words):
    refused_with(change, overrides, words)


def test_all_problems_at_once_and_in_order():
    text = (
        GOOD.replace("dtype: float32", "dtpye: float32")
        .replace("rank: 8", "rnak: 8")
        .replace("chat\n", "caht\n")
    )
    problems = refused(text.replace("group_size: 128", "group_size: 256"), ("train.stpes=3",))
    # a wrong key does not hide the others
    assert [problem.split(": ")[0] for problem in problems] == [
        "r.yaml:4",
        "r.yaml:11",
        "r.yaml:15",
        "override 'train.stpes=3'",
    ]
    # ... and the cross checks run on the sections that are right
    assert refused(GOOD.replace("rank: 8", "rnak: 8").replace("bits: 4", "bits: 1"))[0].startswith(
        "r.yaml:7: quant.bits: got 1"
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"name: \xff\n", "r.yaml:1: got byte 0xff, not UTF-8 text"),
        (b"name: a\x00b\n", "not YAML"),
        (b"a: b: c\n", "r.yaml:1: not YAML: mapping values are not allowed here"),
        (b"a:\n\tb: 1\n", "r.yaml:2: not YAML"),
        (b"- a\n- b\n", "r.yaml:1: got a list; a recipe is a mapping"),
        (b"just text\n", "r.yaml:1: got a str"),
        (b"a: &x [*x]\n", "an alias that contains itself"),
        (b"[" * 3000, "nested too deep"),
        (b"a: " + b"[" * 80 + b"]" * 80, "nested deeper than"),
        (b'a: "\\UFFFFFFFF"\n', "cannot be read"),
        (b"name: !!int abc\n", "not a readable int"),
        (b"? [a]\n: b\n", "got a list or mapping as a key"),
        (b"#" * (1 << 19), "allowed: at most 262144"),
        (
            b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + b"".join(
                b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(6)
            ),
            "more than 100000 values",
        ),
    ],
)
def test_not_a_recipe(data, words):
    Path("r.yaml").write_bytes(data)
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    assert words in str(caught.value)


def test_missing_file_names_the_nearest():
    write(GOOD, "train.yaml")
    with pytest.raises(FileNotFoundError, match="no recipe at trian.yaml; did you mean 'train.yaml'"):
        load_recipe("trian.yaml")
    with pytest.raises(RecipeError, match="got a folder; allowed: a regular file"):
        load_recipe(".")


def test_empty_recipe_lists_what_it_needs():
    text = "\n".join(refused(""))
    for key in ("name", "model.path", "adapter.method", "data.train", "output"):
        assert f"{key}: missing" in text, text


def test_schema_is_one_schema_per_method():
    schema = json.loads(json.dumps(recipe_schema()))
    assert schema["$schema"].endswith("2020-12/schema") and schema["type"] == "object"
    assert set(schema["required"]) == {"name", "model", "adapter", "data", "train", "output"}
    assert schema["additionalProperties"] is False
    adapter = schema["properties"]["adapter"]
    assert len(adapter["oneOf"]) == len(ADAPTERS) and set(adapter["discriminator"]["mapping"]) == set(
        ADAPTERS
    )
    pending, seen = [schema], 0
    while pending:  # every reference leads somewhere, every object is closed
        node = pending.pop()
        if isinstance(node, dict):
            seen += 1
            if isinstance(node.get("$ref"), str):
                assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]
            if "properties" in node and isinstance(node.get("type"), str):
                assert node["additionalProperties"] is False
            pending += node.values()
        elif isinstance(node, list):
            pending += node
    assert seen > 100
    for section in ("ModelSection", "QuantSection", "TrainSection"):
        assert all("description" in entry for entry in schema["$defs"][section]["properties"].values())


def test_thousands_of_unknown_keys_are_told_in_little_time():
    many = "\n".join(f"key_{i}: 1" for i in range(15_000))
    inside = "\n".join(f"  key_{i}: 1" for i in range(15_000))
    began = time.process_time()
    for text in (f"{GOOD}{many}\n", GOOD.replace("train:\n  max", f"train:\n{inside}\n  max")):
        problems = refused(text)
        assert any("and 14900 more" in problem for problem in problems) and len(problems) < 150
    assert time.process_time() - began < 30


def test_a_pipe_is_no_recipe():
    os.mkfifo("r.yaml")
    with pytest.raises(RecipeError, match="r.yaml: got a pipe"):
        load_recipe("r.yaml")


def test_a_pattern_without_an_end_is_a_problem_of_its_section():
    problems = refused(GOOD.replace("  bits: 4\n", "  bits: 4\n  exclude: ['(?R)*']\n"))
    assert any("quant" in problem and "takes more than" in problem for problem in problems)
