"""A teacher that is asked before training: what it needs of the other sections."""

from types import SimpleNamespace

from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.signals import TEACHERS
from tests.recipe.recipe_text import GOOD, refused, write

CACHED = ("train.signal.kind=logits", "train.teacher=cached")


def test_what_a_teacher_that_is_asked_once_needs():
    recipe = load_recipe(write(GOOD), [*CACHED, "train.teacher_dir=answers"])
    assert (recipe.train.teacher, recipe.train.teacher_dir) == ("cached", "answers")
    problems = refused(GOOD, (*CACHED, "data.streaming=true", "train.max_steps=5", "train.epochs=null"))
    assert any("the windows of a streamed data set are not known" in p for p in problems)
    problems = refused(GOOD, ("train.teacher_dir=answers",))
    assert any("train.teacher_dir: got 'answers', which only teacher: cached reads" in p for p in problems)
    problems = refused(GOOD, (CACHED[0], "train.teacher=residual", "train.teacher_dir=answers"))
    assert any("remove it, or set teacher: cached" in p for p in problems)
    quantized = SimpleNamespace(quant=SimpleNamespace(from_checkpoint=True))
    (problem,) = TEACHERS["cached"].problems(quantized, "cached")
    assert "comes quantized, so there is no full-precision model to ask" in problem
    problems = refused(GOOD, (*CACHED, "train.signal.top_k=0"))
    assert any("train.signal.top_k: got 0" in p for p in problems)
