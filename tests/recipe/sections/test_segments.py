"""segments: auto in a recipe: a model that cannot be traced is refused, one without segments is told of."""

from __future__ import annotations

from pathlib import Path

from lowbit_ft.recipe.check import notes
from lowbit_ft.recipe.recipe import load_recipe
from tests.architectures import CONFIGS, checkpoint_of
from tests.recipe.recipe_text import GOOD, refused, write

AUTO = GOOD.replace("  rank: 8\n", "  rank: 8\n  segments: auto\n")


def test_a_model_that_cannot_be_traced_is_refused_by_name(tmp_path: Path) -> None:
    folder = checkpoint_of(CONFIGS["dbrx"](), tmp_path / "dbrx").folder
    text = AUTO.replace("  bits: 4\n", "  bits: 4\n  activations: {segments: auto}\n")
    problems = refused(text, (f"model.path={folder}", "quant.group_size=32"))
    told = [problem for problem in problems if "cannot trace DbrxForCausalLM" in problem]
    assert len(told) == 2 and all(problem.endswith("set segments: none") for problem in told)
    assert "quant.activations.segments: got 'auto'" in told[0] and "adapter.segments: got 'auto'" in told[1]


def test_where_nothing_is_fused_a_note_says_so() -> None:
    found = [note for note in notes(load_recipe(write(AUTO))) if "segments" in note]
    assert found == ["adapter.segments: auto changes nothing here: no packed matrix is fused"]
    heads = GOOD.replace("  bits: 4\n", "  bits: 4\n  activations: {segments: auto}\n")
    assert not [note for note in notes(load_recipe(write(heads))) if "segments" in note], "there are heads"
    assert not [note for note in notes(load_recipe(write(GOOD))) if "segments" in note]
