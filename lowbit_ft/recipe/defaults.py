"""What `auto` is in this recipe: quant.calibrate and the learning rates; and the lengths of windows that the
recipe leaves out, for a model that has fewer positions.

Resolved before anything is checked, so that the recipe in the run folder says what was done. `taken` tells
the user, with the reason.
"""

from __future__ import annotations

from typing import Any

from ..adapters.rates import rate_for
from ..data.mix import named
from .incoming import resolve_quant
from .layers import shapes_here
from .sections.base import Section
from .sections.data import DataSection
from .sections.quant import QuantSection
from .sections.train import AUTO, TrainSection
from .yaml import Problem

LENGTHS = {"sequence_len", "window"}  # keys of windows, in tokens


def resolve(values: dict[str, Any]) -> dict[str, Any]:
    """The sections with every auto replaced whose neighbours are there to decide it. A key that the recipe
    leaves out stays out of model_fields_set: that is how `taken` knows."""
    found = values = dict(_within(values))
    quant, train, adapter = (values.get(name) for name in ("quant", "train", "adapter"))
    model = values.get("model")
    if model is not None and (new := model.add_tokens) is not None and new.audio is not None:
        new = new.model_copy(update={"audio": new.audio.settled()})
        found["model"] = model.model_copy(update={"add_tokens": new})
    task, measured = values.get("task"), values.get("eval")
    if isinstance(quant, QuantSection):
        shapes = None if task is None or model is None else shapes_here(model.path, model.revision)
        walked = task is None or task.walks({} if shapes is None else shapes.config)
        found["quant"] = quant.resolved(walked and _has_rows(values.get("data"), quant))
    if task is not None and not task.windows and measured is not None and "windows" in unsaid(measured):
        found["eval"] = measured.model_copy(update={"windows": None})  # rows: all of them
        found["eval"].model_fields_set.discard("windows")
    if isinstance(train, TrainSection) and quant is not None and adapter is not None:
        train = found["train"] = _with_rate(train, rate_for(adapter.method, quant.bits)[0])
        if task is not None and task.trains_head and "modules_learning_rate" in unsaid(train):
            # a head that is new, not one that comes trained
            found["train"] = train.model_copy(update={"modules_learning_rate": train.learning_rate})
            found["train"].model_fields_set.discard("modules_learning_rate")
    return found


def settled(recipe: Any) -> tuple[Any, list[Problem]]:
    """The recipe once its checkpoint is on this disk, and what it says against a checkpoint that is quantized
    already: that one's grid is taken, and what was auto is that of its bits and positions. Equal to a recipe
    that load_recipe made with the checkpoint at hand.
    """
    quant, against = resolve_quant(recipe.model, recipe.quant)
    train = recipe.train
    if "learning_rate" not in train.model_fields_set:
        train = train.model_copy(update={"learning_rate": AUTO})
    values = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    return recipe.model_copy(update=resolve(values | {"quant": quant, "train": train})), against


def taken(recipe: Any) -> list[str]:
    """A line for each key that was auto."""
    found, quant, train, adapter = [], recipe.quant, recipe.train, recipe.adapter
    if "calibrate" not in quant.model_fields_set:
        why = f"the default at {quant.bits} bits"
        if quant.reads_text:
            text = named(recipe.data.train) or "data.synthesis"
            why = f"the default at {quant.bits} bits; it looks at rows of {quant.calibration.path or text}"
        found.append(f"quant.calibrate: {quant.calibrate} ({why})")
    if "learning_rate" not in train.model_fields_set:
        why = rate_for(adapter.method, quant.bits)[1]
        scales = "" if train.scale_learning_rate is None else f", of scales {train.scale_learning_rate:g}"
        found.append(f"train.learning_rate: {train.learning_rate:g}{scales} ({why})")
    if recipe.task.trains_head and "modules_learning_rate" in unsaid(train):
        found.append(f"train.modules_learning_rate: {train.modules_learning_rate:g} (the head of the task)")
    data = recipe.data
    if (
        "sequence_len" in unsaid(data)
        and data.sequence_len != type(data).model_fields["sequence_len"].default
    ):
        found.append(f"data.sequence_len: {data.sequence_len} (all positions that the model has)")
    return found


def _within(values: dict[str, Any]) -> dict[str, Any]:
    """The sections with the lengths that the recipe does not say cut to the positions that the model has."""
    model = values.get("model")
    shapes = shapes_here(model.path, model.revision) if model is not None else None
    limit = shapes.positions if shapes is not None else None
    return values if limit is None else {name: _cut(section, limit) for name, section in values.items()}


def _cut(section: Any, limit: int) -> Any:
    """A section, and those in it, with the lengths that are not said at most `limit`."""
    if not isinstance(section, Section):
        return section
    changed = {name: cut for name, value in section if (cut := _cut(value, limit)) is not value}
    changed |= {name: limit for name in LENGTHS & unsaid(section) if getattr(section, name) > limit}
    if not changed:
        return section
    kept = section.model_fields_set
    section = section.model_copy(update=changed)
    section.model_fields_set.intersection_update(kept)
    return section


def unsaid(section: Section) -> set[str]:
    """The keys that the recipe does not set."""
    return type(section).model_fields.keys() - section.model_fields_set


def _with_rate(train: TrainSection, rate: float) -> TrainSection:
    fitted = train.reconstruct
    if fitted is not None and fitted.learning_rate == AUTO:
        train = train.model_copy(update={"reconstruct": fitted.model_copy(update={"learning_rate": rate})})
    if train.learning_rate != AUTO:
        return train
    section = train.model_copy(update={"learning_rate": rate})
    section.model_fields_set.discard("learning_rate")
    return section


def _has_rows(data: Any, quant: QuantSection) -> bool:
    """Whether there is text for a calibrator to look at."""
    given = isinstance(data, DataSection) and (data.train is not None or data.synthesis is not None)
    return given or quant.calibration.path is not None
