"""data.chat_template and its kwargs: whether there is such a template, what it reads, and what needs one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...data.formats import FORMATS
from ...files.tensorfile import CheckpointError
from ...model.chat_template import SUFFIXES, Template, is_text, refused, template_text, told
from ...model.tokenizer import read_tokenizer
from ...names import listed
from ..layers import has_chat_template, local_folder
from ..paths import near_names, path_is
from ..yaml import Problem
from .base import Problems
from .data import sources_at

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
HERE, KWARGS = ("data", "chat_template"), ("data", "chat_template_kwargs")


def check_template(r: Any) -> Problems:
    """A template that is there and is one, and kwargs that it reads."""
    yield from _template(r, fetch=False)[1]


def with_template(recipe: Any) -> tuple[Any, list[Problem]]:
    """The recipe with the text of its template in it, so that a run keeps the one it began with, and what is
    wrong with it. Its checkpoint is on this disk."""
    text, problems = _template(recipe, fetch=True)
    if problems or recipe.data.chat_template in (None, text):
        return recipe, problems
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"chat_template": text})}), []


def written_with(r: Any, tokenizer: Any) -> Any:
    """The tokenizer of the model, writing chats as the recipe says where that can be known by now."""
    text, problems = _template(r, fetch=False)
    template = text or tokenizer.chat_template
    if not problems and template and (text or r.data.chat_template_kwargs):
        tokenizer.chat_template = told(template, r.data.chat_template_kwargs)
    return tokenizer


def _template(r: Any, fetch: bool) -> tuple[str | None, list[Problem]]:
    """(the text of data.chat_template: None without one, or where it is on the hub and not to be fetched,
    what is wrong)"""
    given, kwargs = r.data.chat_template, r.data.chat_template_kwargs
    text = None
    if given is not None:
        try:
            text = template_text(given, fetch=fetch)
        except ValueError as error:
            path = Path(given)
            near = not is_text(given) and path.suffix in SUFFIXES and not path_is(path, "any")
            shown = "a text" if is_text(given) else repr(given)
            return None, [Problem(HERE, f"got {shown}: {error}{near_names(path) if near else ''}")]
        if text is None:
            return None, []
    if not kwargs:
        return text, []
    template: Template | None = text
    if template is None:
        folder = local_folder(r.model.path, r.model.revision)
        if folder is None:
            return None, []  # looked at once it is there
        try:
            template = read_tokenizer(folder).chat_template
        except CheckpointError:
            return None, []  # the start of the run tells what is missing
        if not template:
            return None, [
                Problem(
                    KWARGS,
                    f"got {listed(kwargs)}, but {r.model.path} has no chat template that could read them; "
                    "set data.chat_template, or remove them",
                )
            ]
    problems = [
        Problem((*KWARGS, name), f"got {kwargs[name]!r}, but {why}")
        for name, why in refused(kwargs, template)
    ]
    return text, problems


def check_chat(r: Any) -> Problems:
    """Formats of turns need a chat template."""
    if r.task.reads != "text":
        return
    folder = Path(r.model.path).expanduser()
    if not path_is(folder, "dir") or has_chat_template(folder):
        return  # a hub id: data/examples.py looks, once the tokenizer is there
    if not any(path_is(folder / name, "file") for name in TOKENIZER_FILES):
        yield Problem(
            ("model", "path"),
            f"got {r.model.path!r}, which has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy it there",
        )
        return
    if r.data.chat_template is not None:
        return
    fix = "set data.chat_template (chatml, a file, or a model that has one)"
    config = r.data.synthesis
    if config is not None and config.needs_template:
        yield Problem(
            ("data", "synthesis", "kind"),
            f"got {config.kind!r}, but {r.model.path} has no chat template; set "
            f"{config.without_template}, or {fix}",
        )
    sources = sources_at(("data", "train"), r.data.train) + sources_at(("data", "valid"), r.data.valid)
    for where, source in sources:
        if source.format is not None and FORMATS[source.format].needs_template:
            others = listed(name for name, kind in FORMATS.items() if not kind.needs_template)
            message = f"got {source.format!r}, but {r.model.path} has no chat template; allowed: {others}"
            yield Problem((*where, "format"), f"{message}; or {fix}")
