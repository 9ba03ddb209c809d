"""What a run would meet that a plan can see: the rows of its data, and another run in its output folder."""

from __future__ import annotations

from ..data.errors import DataError
from ..data.form import form_of
from ..data.formats import FORMATS
from ..data.mix import sources_of
from ..model.config import read_config
from ..recipe.defaults import settled
from ..recipe.layers import local_folder
from ..recipe.recipe import Recipe
from ..recipe.sections.chat import with_template
from ..rundir import RunDir


def show_checks(recipe: Recipe) -> list[str]:
    """Print what is known of the rows; returns what a run would be refused for."""
    said, wrong = rows(recipe)
    for line in said:
        print(f"    rows  {line}")
    refused = existing(recipe)[1]
    return wrong if refused is None else [*wrong, f"{refused} (run would end with this)"]


def existing(recipe: Recipe) -> tuple[str | None, str | None]:
    """(a note about the run that is in the output folder, the error with which that run is refused there);
    None where there is neither."""
    run = RunDir(recipe.output, main=False)
    if not (run / "recipe.yaml").is_file():
        return None, None
    folder = local_folder(recipe.model.path, recipe.model.revision)
    if folder is not None:  # as `session.start` makes it
        recipe = with_template(settled(recipe)[0])[0]
        if not recipe.task.language:
            recipe = recipe.model_copy(update={"task": recipe.task.settled(recipe, read_config(folder))})
    changed = run.changed(recipe) if folder is not None else []  # a grid of the hub is not known yet
    if changed and run.trained:
        return None, run.refused(changed)
    if changed:
        return (
            f"{run.path} holds a run of another recipe that has not trained yet ({', '.join(changed)} "
            "differ); this one takes its place"
        ), None
    if not (done := run.finished()):
        return None, None
    return f"{run.path} holds this run already: it is continued ({', '.join(done)} finished there)", None


def rows(recipe: Recipe) -> tuple[list[str], list[str]]:
    """(what is said of the rows, what is wrong with them), of data.train and data.valid."""
    said: list[str] = []
    wrong: list[str] = []
    for label, given in (("train", recipe.data.train), ("valid", recipe.data.valid)):
        count, whole = 0, True
        for source in sources_of(given):
            try:
                form = form_of(source, recipe.data.on_bad_row)
            except DataError as error:
                wrong.append(f"data.{label}: {error}")
                whole = False
                continue
            if form.rows is None:
                said.append(f"data.{label} is not read here ({form.why}): a run checks its rows")
                whole = False
                continue
            count += form.rows - form.bad
            whole &= source.format is None or not FORMATS[source.format].joined
            said.append(
                f"{form.rows:,} in {source.path}"
                + (f", {form.bad:,} of them are malformed and skipped" if form.bad else "")
            )
        if label == "train" and whole and count and (passes := _passes(recipe, count)) is not None:
            said[-1] += passes
    return said, wrong


def _passes(recipe: Recipe, rows: int) -> str | None:
    """How often the rows are seen at the least: a window holds one row or more."""
    section = recipe.train
    if not section.max_steps:
        return None
    windows = section.max_steps * section.micro_batch_size * section.gradient_accumulation_steps
    if windows <= rows:
        return None
    return f", seen at least {windows / rows:.1f} times ({windows:,} windows; packed, more often)"
