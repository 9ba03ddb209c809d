"""data.chat_template and its kwargs in a recipe: what is refused, with its line, and what is kept."""

from pathlib import Path

import pytest

from lowbit_ft.recipe.recipe import load_recipe
from tests.chat_templates import THINKS, THINKS_ANYWHERE
from tests.recipe.recipe_text import GOOD, problems_with, refused, write


def test_the_recipe_says_what_is_wrong() -> None:
    Path("mine.jinja").write_text("{{ messages }}\n" + THINKS)
    assert (
        problems_with(GOOD, ("data.chat_template=mine.jinja", "data.chat_template_kwargs.enable_thinking=no"))
        == []
    )
    for overrides, words in (
        (
            ("data.chat_template=mien.jinja",),
            "data.chat_template: got 'mien.jinja': no such file, and no such name",
        ),
        (("data.chat_template=mien.jinja",), "; did you mean 'mine.jinja'?"),
        (
            ("data.chat_template='{% if %}'",),
            "data.chat_template: got a text: the text:1: Expected an expression",
        ),
        (
            ("data.chat_template=mine.jinja", "data.chat_template_kwargs={thinking: false}"),
            "data.chat_template_kwargs.thinking: got False, but the chat template never reads it",
        ),
        (
            ("data.chat_template_kwargs={enable_thinking: false}",),
            "never reads it; it reads none; remove it",
        ),
        (("data.chat_template_kwargs=3",), "data.chat_template_kwargs: got 3"),
    ):
        assert any(words in problem for problem in refused(GOOD, overrides)), refused(GOOD, overrides)


@pytest.mark.parametrize("text", [*THINKS_ANYWHERE, "a\r\n\t{{ x }} \n trailing \n", "#: {{ '|' }}\n- a\n"])
def test_a_recipe_keeps_the_text_to_the_letter(text: str) -> None:
    recipe = load_recipe(write(GOOD), check=False)
    data = recipe.data.model_copy(update={"chat_template": text})
    again = write(recipe.model_copy(update={"data": data}).to_yaml())
    assert load_recipe(again, check=False, folders=()).data.chat_template == text
