"""The quant section of a recipe whose checkpoint is quantized already: the checkpoint decides, the recipe may
only agree.

Leave `quant` out. What it would say (bits, group size, symmetry, scale dtype, which layers, residual_bits: 0)
is read from the checkpoint's config.json and headers and written into the resolved recipe, with `calibrate:
from_checkpoint`. A key that is written down and says something else is an error with its line: nothing is
ever requantized on the way in. What is dense there and may be packed all the same is the token embedding.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..incoming import Incoming
from .layers import Shapes, local_folder, read_shapes
from .sections.calibration import CalibrationSection
from .sections.model import ModelSection
from .sections.overrides import OverrideSection
from .sections.quant import FROM_CHECKPOINT, QuantSection
from .yaml import Problem


def resolve_quant(model: ModelSection, quant: QuantSection) -> tuple[QuantSection, list[Problem]]:
    """The section as the checkpoint has it, and what the recipe says against it. A dense checkpoint changes
    nothing, one that is not on this disk (a hub id) waits until it is; one that cannot be read is told by
    check_model."""
    folder = local_folder(model.path, model.revision)
    if folder is None:
        return quant, []
    try:
        shapes = read_shapes(folder)
    except (OSError, ValueError):
        return quant, []
    if shapes.incoming is not None:
        return _resolved(quant, shapes, shapes.incoming, Path(model.path).name)
    if quant.from_checkpoint:
        message = (
            f"got '{FROM_CHECKPOINT}', but {model.path} is not quantized; remove the key, or give a "
            "GPTQ, AWQ or compressed-tensors checkpoint"
        )
        return quant, [Problem(("quant", "calibrate"), message)]
    return quant, []


def _resolved(
    quant: QuantSection, shapes: Shapes, incoming: Incoming, name: str
) -> tuple[QuantSection, list[Problem]]:
    grids = {layer.name: layer.grid for layer in incoming.layers.values()}
    kinds = {layer: (grid.bits, grid.group_size, grid.symmetric) for layer, grid in grids.items()}
    most = Counter(kinds.values()).most_common(1)[0][0]
    bits, group_size, symmetric = most
    first = next(iter(grids.values()))
    facts: dict[str, Any] = {
        "grid": "integer",
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "residual_bits": 0,
        "calibrate": FROM_CHECKPOINT,
        "scale_dtype": first.scale_dtype,
    }
    problems = []
    for key, value in facts.items():
        given = getattr(quant, key)
        if key not in quant.model_fields_set or given == value:
            continue
        if key == "scale_dtype" and (value == "bfloat16" or given == "float32"):
            facts[key] = (
                given  # holds every scale the checkpoint has (or the layer that it does not hold refuses)
            )
            continue
        problems.append(
            Problem(
                ("quant", key),
                f"got {_yaml(given)}; {name} is {incoming} with {_yaml(value)}{_why(key)}; remove the key",
            )
        )
    for key in ("mse_p", "calibration", "lm_head"):
        default = QuantSection.model_fields[key].get_default(call_default_factory=True, validated_data={})
        given = getattr(quant, key)
        if isinstance(given, CalibrationSection):
            # its length is cut to the model's positions (defaults.py), whoever reads it
            given = given.model_copy(update={"sequence_len": default.sequence_len})
            if quant.activations is not None and quant.activations.reads_text:
                continue  # what the inputs' scales look at
        if given != default:
            problems.append(
                Problem(
                    ("quant", key),
                    f"set, but {name} is quantized already ({incoming}): nothing is calibrated or packed; "
                    "remove the key",
                )
            )
    names = [layer.name for layer in shapes.linears]
    overrides = [
        OverrideSection(match=layer, **_other(kind, most)) for layer, kind in kinds.items() if kind != most
    ]
    resolved = quant.model_copy(update=facts)
    if "overrides" not in quant.model_fields_set:
        resolved = resolved.model_copy(update={"overrides": overrides})
    elif wrong := [layer for layer, kind in kinds.items() if _size(resolved, layer) != kind]:
        bits, group_size, flat = _size(resolved, wrong[0])
        message = (
            f"makes {wrong[0]} {bits} bit, group {group_size}, {'sym' if flat else 'asym'}; {name} has it as "
            f"{grids[wrong[0]]}"
        )
        problems.append(Problem(("quant", "overrides"), f"{message}; remove the key"))
    if not {"targets", "exclude"} & quant.model_fields_set:
        resolved = resolved.model_copy(update=_selection(resolved, names, set(grids)))
    elif wrong := [layer for layer in names if (resolved.skip_reason(layer) is None) != (layer in grids)]:
        is_packed = "packed" if wrong[0] in grids else "not packed"
        key = next(k for k in ("targets", "exclude") if k in quant.model_fields_set)
        message = f"chooses other layers than are packed in {name}: {wrong[0]} is {is_packed} there"
        problems.append(Problem(("quant", key), f"{message}; remove targets and exclude"))
    return resolved, problems


def _selection(quant: QuantSection, names: list[str], packed: set[str]) -> dict[str, Any]:
    """targets and exclude that choose exactly the packed layers: the defaults, else the ends of names, else
    names.
    """

    def chooses(targets: Any, exclude: list[str]) -> bool:
        section = quant.model_copy(update={"targets": targets, "exclude": exclude})
        return {name for name in names if section.skip_reason(name) is None} == packed

    for exclude in (quant.exclude, []):
        if chooses("all-linear", exclude):
            return {"targets": "all-linear", "exclude": exclude}
    ends = sorted({name.rpartition(".")[2] for name in packed})
    if chooses(ends, []):
        return {"targets": ends, "exclude": []}
    return {"targets": sorted(packed), "exclude": []}


def _other(kind: tuple[int, int, bool], most: tuple[int, int, bool]) -> dict[str, Any]:
    """The keys of an override for a layer of this kind, where most are of another."""
    bits, group_size, symmetric = kind
    size = {"bits": bits, "group_size": group_size} if kind[:2] != most[:2] else {}
    return size | ({"symmetric": symmetric} if symmetric != most[2] else {})


def _size(quant: QuantSection, layer: str) -> tuple[int, int, bool]:
    settings = {"bits": quant.bits, "group_size": quant.group_size, "symmetric": quant.symmetric}
    for override in quant.overrides:
        if override.means([layer]):
            settings |= override.given
    return settings["bits"], settings["group_size"], bool(settings["symmetric"])


def _why(key: str) -> str:
    return ": the fraction that rounding threw away is not in it" if key == "residual_bits" else ""


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
