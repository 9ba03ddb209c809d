"""What `auto` is in this recipe: quant.calibrate and the learning rates.

Resolved before anything is checked, so that the recipe in the run folder says what was done. `taken` tells
the user, with the reason.
"""

from __future__ import annotations

from typing import Any

from ..adapters.rates import rate_for
from .incoming import resolve_quant
from .sections.data import DataSection
from .sections.quant import QuantSection
from .sections.train import AUTO, TrainSection
from .yaml import Problem


def resolve(values: dict[str, Any]) -> dict[str, Any]:
    """The sections with every auto replaced whose neighbours are there to decide it. A key that the recipe
    leaves out stays out of model_fields_set: that is how `taken` knows."""
    found = dict(values)
    quant, train, adapter = (values.get(name) for name in ("quant", "train", "adapter"))
    if isinstance(quant, QuantSection):
        found["quant"] = quant.resolved(_has_rows(values.get("data"), quant))
    if isinstance(train, TrainSection) and quant is not None and adapter is not None:
        found["train"] = _with_rate(train, rate_for(adapter.method, quant.bits)[0])
    return found


def settled(recipe: Any) -> tuple[Any, list[Problem]]:
    """The recipe once its checkpoint is on this disk, and what it says against a checkpoint that is quantized
    already: that one's grid is taken, and rates that were auto are those of its bits. Equal to a recipe that
    load_recipe made with the checkpoint at hand.
    """
    quant, against = resolve_quant(recipe.model, recipe.quant)
    train = recipe.train
    if "learning_rate" not in train.model_fields_set:
        train = train.model_copy(update={"learning_rate": AUTO})
    values = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    found = resolve(values | {"quant": quant, "train": train})
    return recipe.model_copy(update={"quant": found["quant"], "train": found["train"]}), against


def taken(recipe: Any) -> list[str]:
    """A line for each key that was auto."""
    found, quant, train, adapter = [], recipe.quant, recipe.train, recipe.adapter
    if "calibrate" not in quant.model_fields_set:
        why = f"the default at {quant.bits} bits"
        if quant.reads_text:
            why += f"; it looks at rows of {quant.calibration.path or recipe.data.train.path}"
        elif (other := quant.start(rows=True)) != quant.calibrate:
            why += f" without data.train; {other}, if it is named, looks at the rows that the model writes"
        found.append(f"quant.calibrate: {quant.calibrate} ({why})")
    if "learning_rate" not in train.model_fields_set:
        why = rate_for(adapter.method, quant.bits)[1]
        scales = "" if train.scale_learning_rate is None else f", of scales {train.scale_learning_rate:g}"
        found.append(f"train.learning_rate: {train.learning_rate:g}{scales} ({why})")
    return found


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
    given = isinstance(data, DataSection) and data.train is not None
    return given or quant.calibration.path is not None
