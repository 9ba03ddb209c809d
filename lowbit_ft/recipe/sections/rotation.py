"""quant.rotation and quant.smooth: which sites are turned before packing, and whether this model and this
format can have that.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from lowbit_kernels.hadamard import hadamard_problem
from pydantic import Field

from ...export import EXPORTERS
from ...grid.calibrate import CALIBRATORS
from ...model.config import head_width
from ...rotations import FAMILIES, ROTATIONS, family_problems, modulated
from ..layers import Shapes, shapes_here
from ..values import OneOf
from ..yaml import Problem
from .base import Problems, Section

CRITERIA = {"both": (True, True), "weights": (True, False), "activations": (False, True)}


class SitesSection(Section):
    """Where. With kind: adaptive, r2, r3 and r4 are candidates that every layer decides on."""

    r1: bool = Field(default=True, description="the residual stream; folded, no op is left at inference")
    r2: bool = Field(default=True, description="the heads of v, up to o_proj; folded")
    r3: bool = Field(
        default=False,
        description="the keys behind their rotary embedding, where quant.kv_cache rounds them; native only",
    )
    r4: bool = Field(
        default=False,
        description="the input of down_proj: the weight is folded, a Hadamard before it stays; native only",
    )


class RotationSection(Section):
    """Random Hadamard rotations that are folded into the weights before they are packed."""

    kind: Annotated[str, OneOf(ROTATIONS)] = Field(
        default="none",
        description="hadamard: every site in every layer; adaptive: r2, r3 and r4 only in the layers where "
        "they lower the error on calibration rows (RoSTE)",
    )
    sites: SitesSection = Field(default_factory=lambda: SitesSection(), description="where")
    seed: int = Field(default=0, ge=0, lt=1 << 31, description="of the random signs")
    criterion: Literal["both", "weights", "activations"] = Field(
        default="both", description="adaptive: whose relative error decides"
    )

    @property
    def turns(self) -> bool:
        return ROTATIONS[self.kind].turns


def check_rotation(r: Any) -> Problems:
    """The sites against the model, before anything is loaded."""
    section, smooth = r.quant.rotation, r.quant.smooth
    if not r.quant.folds:
        return
    sites = section.sites if section.turns else SitesSection(r1=False, r2=False)
    where = ("quant", "rotation") if section.turns else ("quant", "smooth")
    if (calibrator := CALIBRATORS.get(r.quant.calibrate)) is not None and calibrator.exact:
        yield Problem(
            where,
            f"got a fold beside quant.calibrate: {r.quant.calibrate}, whose weights lie on a grid that a "
            "fold takes them off; set kind: none and smooth: null, or calibrate: auto",
        )
        return
    if section.turns and not any(wanted for _, wanted in sites):
        yield Problem(("quant", "rotation", "sites"), "all are false; set one to true, or kind: none")
    if ROTATIONS[section.kind].needs_rows and section.criterion == "activations":
        if r.quant.activations is None and not sites.r3:
            yield Problem(
                ("quant", "rotation", "criterion"),
                "got 'activations', but inputs stay in 16 bits; set quant.activations, or criterion: both",
            )
    yield from _check_keys(r, sites)
    if sites.r4 and hasattr(r, "export") and (reason := EXPORTERS[r.export.format].no_online):
        yield Problem(
            ("quant", "rotation", "sites", "r4"),
            f"got true, which leaves a Hadamard before down_proj, and {r.export.format} {reason}; set r4: "
            "false (r1 and r2 are in the weights, which every format holds), or export.format: native",
        )
    shapes = shapes_here(r.model.path, r.model.revision)
    if shapes is None:
        return
    if shapes.incoming is not None or r.quant.from_checkpoint:
        yield Problem(
            where,
            f"{r.model.path} is quantized already, and a rotation would round it anew; give the "
            "full-precision checkpoint, or set kind: none and quant.smooth: null",
        )
        return
    for text in family_problems(
        modulated(shapes.config) or str(shapes.config.get("model_type")),
        shapes.number("hidden_size", "n_embd", "d_model"),
        head_width(shapes.number, values=True),
        sites.r1,
        sites.r2,
        smooth is not None,
    ):
        yield Problem(where, text)
    for text in down_problems(shapes) if sites.r4 else []:
        yield Problem(("quant", "rotation", "sites", "r4"), f"got true, but {text}; set r4: false")


def _check_keys(r: Any, sites: SitesSection) -> Problems:
    """r3 turns what a KV cache rounds, and so has to find one that does not turn it itself."""
    here = ("quant", "rotation", "sites", "r3")
    if not sites.r3:
        return
    if r.quant.kv_cache is None:
        yield Problem(here, "got true, but nothing rounds the keys; set quant.kv_cache, or r3: false")
    elif (reason := r.quant.kv_cache.config(r3=(0,)).reject()) is not None:
        yield Problem(here, f"got true: {reason[1]}")
    elif hasattr(r, "export") and not EXPORTERS[r.export.format].carries_kv_cache:
        yield Problem(
            here,
            f"got true, but no server of {r.export.format} turns keys before it caches them; set r3: false, "
            "or export.format: native",
        )


def down_problems(shapes: Shapes) -> list[str]:
    """Why the input of down_proj cannot be turned."""
    family = FAMILIES.get(str(shapes.config.get("model_type")))
    if family is None:
        return []
    if any(layer.expert is not None for layer in shapes.linears):
        return ["the inputs of a mixture's experts are not rotated"]
    ends = tuple(f".{name}" for name in family.down)
    widths = {layer.in_features for layer in shapes.linears if layer.name.endswith(ends)}
    return [reason for width in sorted(widths) if (reason := hadamard_problem(width))]
