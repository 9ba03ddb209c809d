"""Whatever is given, a Recipe or a RecipeError comes out and nothing else. The examples are the same in every
run; with LOWBIT_FUZZ=all in the environment there are more of them, as in benchmarks/fuzz.py.
"""

import os
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.grid.calibrate import CALIBRATORS
from lowbit_ft.recipe.recipe import Recipe, load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from tests.recipe.recipe_text import GOOD, write


def outcome(path: str, overrides: tuple[str, ...] = ()) -> None:
    """A Recipe or a RecipeError with at least one line; anything else is a bug."""
    try:
        assert isinstance(load_recipe(path, overrides), Recipe)
    except RecipeError as error:
        assert error.problems and all(
            isinstance(problem, str) and "\n" not in problem for problem in error.problems
        )


EXAMPLES = 150 if os.environ.get("LOWBIT_FUZZ") == "all" else 60
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


WORDS = sorted(
    {"all-linear", "chat", "lm_head", "cpu", "*", "(", "1e-4", "a\x00b", "~", "/", "x" * 300}
    | set(ADAPTERS)
    | set(CALIBRATORS)
)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 9),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)


VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3)
)


@FUZZ
@given(st.binary(max_size=200))
def test_fuzz_bytes(data):
    Path("f.yaml").write_bytes(data)
    outcome("f.yaml")


@FUZZ
@given(st.text(alphabet="abn:-[]{}&*!|>'\"%@`#,?<\n\t \\0123456789.eu~", max_size=80))
def test_fuzz_yaml_text(text):
    Path("f.yaml").write_text(text, encoding="utf-8")
    outcome("f.yaml")


@FUZZ
@given(st.data())
def test_fuzz_one_wrong_value_anywhere(data):
    tree = load_recipe(write(GOOD), check=False).model_dump(mode="json")
    path = data.draw(st.sampled_from(sorted(paths(tree))))
    target = tree
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = data.draw(VALUES)
    write(yaml.safe_dump(tree), "f.yaml")
    outcome("f.yaml")


@FUZZ
@given(
    st.sampled_from(["quant", "adapter", "train", "data", "eval", "export", "model", "name", "output"]),
    st.data(),
)
def test_fuzz_sections(section, data):
    keys = ["method", "rank", "path", "format", "bits", "overrides", "train", "generate", "betas"]
    tree = yaml.safe_load(GOOD)
    tree[section] = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, max_size=4))
    write(yaml.safe_dump(tree), "f.yaml")
    outcome("f.yaml")


@FUZZ
@given(
    st.lists(
        st.text(max_size=20) | st.builds("train.{}={}".format, st.text(max_size=4), st.text(max_size=8)),
        max_size=3,
    )
)
def test_fuzz_overrides(overrides):
    outcome(write(GOOD), tuple(overrides))


def paths(tree: object, prefix: tuple = ()) -> set[tuple]:
    """Every key path of a nested dict."""
    found = set()
    if isinstance(tree, dict):
        for key, value in tree.items():
            found |= {(*prefix, key)} | paths(value, (*prefix, key))
    return found
