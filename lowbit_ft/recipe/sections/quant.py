"""quant: how the frozen base is packed, and whether grid, calibrator and patterns fit each other and the
layers of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ...export import EXPORTERS
from ...grid import GRIDS, Grid, grid_of
from ...grid.calibrate import CALIBRATORS, calibrators_of
from ...model.roles import OTHER_TOWERS, is_head, is_token_embedding
from ...names import did_you_mean, kinds_of, listed, matches, nearest_layers, pattern_error
from ...rotations import ROTATIONS
from ..errors import shown
from ..layers import Layer, Shapes, shapes_here
from ..values import OneOf
from ..yaml import KeyPath, Problem
from .activations import ActivationsSection
from .base import GroupSize, Positive, Problems, Section, Unit
from .calibration import CalibrationSection
from .kv_cache import KVCacheSection
from .overrides import OverrideSection, check_overrides, layers_apart
from .rotation import RotationSection
from .sparsity import SparsitySection

AUTO, FROM_CHECKPOINT = "auto", "from_checkpoint"
GROUP_SIZES = (32, 64, 128, 256)


class QuantSection(Section):
    """How the frozen base is packed."""

    grid: Annotated[str, OneOf(GRIDS)] = Field(
        default="integer", description="integer codes with a scale, or binary planes (alpha_tuning)"
    )
    bits: Literal[1, 2, 3, 4, 6, 8] = Field(default=4, description="integer: 2, 3, 4, 6, 8; binary: 1 to 4")
    group_size: GroupSize = Field(default=128, description="inputs that share a scale; -1: the whole row")
    symmetric: bool = Field(default=True, description="no zero points: what every format and server loads")
    residual_bits: Literal[0, 1, 2, 4] = Field(
        default=4, description="bits of the rounding error kept for training (integer grid only)"
    )
    calibrate: str = Field(
        default=AUTO,
        description="integer: absmax, narrow_range (absmax without the lowest code: GLM-130B's), ternary "
        "(-s, 0, s: TWN's, at 2 bits, and they stay it), minmax, mse, gptq, signround, recover (weights that "
        "lie on the grid already); binary: greedy, alternating, mean (LLM-QAT's, 1 and 2 bits); auto: gptq "
        "at 2, 3 and 4 bits where there are rows to look at (those of data.train), else mse, and greedy for "
        "planes; from_checkpoint: the codes of a checkpoint that is quantized already (set by itself)",
        json_schema_extra=lambda schema: schema.update(enum=[AUTO, *CALIBRATORS, FROM_CHECKPOINT]),
    )
    scale_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16",
        description="dtype of the scales that train and ship: bfloat16 values fit every format; a "
        "quantized checkpoint brings its own",
    )
    mse_p: Positive = Field(
        default=2.4, description="mse: the error norm |w - w_hat|^p that the clipping search minimises"
    )
    calibration: CalibrationSection = Field(
        default_factory=lambda: CalibrationSection(), description="text for gptq and signround"
    )
    targets: Literal["all-linear"] | list[str] = Field(
        default="all-linear",
        description="all-linear (attention and MLP linears of the decoder layers), or names, globs, "
        "regexes of layers",
    )
    exclude: list[str] = Field(
        default=["lm_head"], description="layers left in full precision: names, globs or regexes"
    )
    overrides: list[OverrideSection] = Field(
        default=[],
        description="other bits, group sizes or symmetry for some layers, or for parts of fused ones "
        "(*.qkv_proj.v); the last match wins",
    )
    lm_head: Literal[4, 8] | None = Field(
        default=None,
        description="bits of the output head, packed and trained too (whatever exclude says); "
        "null: full precision",
    )
    embeddings: Literal[4, 8] | None = Field(
        default=None, description="bits of the token embedding, packed and frozen; null: full precision"
    )
    convolutions: bool = Field(
        default=False,
        description="pack convolutions too, as matrices [N, C k k] by the keys above, and train them "
        "(exclude and targets name them as they do linears); false: full precision",
    )
    rotation: RotationSection = Field(
        default_factory=lambda: RotationSection(), description="a basis in which rounding loses less"
    )
    smooth: Unit | Literal["auto"] | None = Field(
        default=None,
        description="what stands behind a norm is divided by max|x|^alpha / max|W|^(1 - alpha), channel by "
        "channel, and the weights are multiplied (SmoothQuant); a number: alpha; auto: of 0, 0.25, 0.5, 0.75 "
        "and none what costs the output of these linears least, norm by norm; null: none",
    )
    sparsity: SparsitySection = Field(
        default_factory=lambda: SparsitySection(), description="weights that are zero, and stay it"
    )
    activations: ActivationsSection | None = Field(
        default=None, description="put the layers' inputs on a grid too (W4A8); null: 16 bits"
    )
    kv_cache: KVCacheSection | None = Field(
        default=None, description="train with keys and values as a low-bit cache keeps them; null: 16 bits"
    )

    @model_validator(mode="after")
    def _integers_only(self) -> QuantSection:
        for key in ("lm_head", "embeddings"):
            if not GRIDS[self.grid].packs_tables and getattr(self, key) is not None:
                fits = " or ".join(name for name, grid in GRIDS.items() if grid.packs_tables)
                raise ValueError(
                    f"{key} {getattr(self, key)} needs quant.grid: {fits}; the recipe has {self.grid}"
                )
        return self

    @field_validator("targets", mode="before")
    @classmethod
    def _all_linear_or_list(cls, value: Any) -> Any:
        if value == "all-linear" or (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        ):
            return value
        hint = did_you_mean(value, ["all-linear"]) if isinstance(value, str) else ""
        raise ValueError(
            f"{shown(value)}; allowed: all-linear, or a list of layer names, globs or regexes{hint}"
        )

    @property
    def keeps_residual(self) -> bool:
        """The grid has residual bits to keep."""
        return any(field.name == "residual_bits" for field in fields(GRIDS[self.grid]))

    @property
    def reads_text(self) -> bool:
        """What packs looks at text (quant.calibration): the calibrator, or what chooses the zeros."""
        text = self.calibrate in CALIBRATORS and CALIBRATORS[self.calibrate].needs_text
        return text or self.sparsity.at_once.needs_text

    @property
    def locks(self) -> bool:
        """Some weights of the base are locked at zero."""
        return self.sparsity.at_once.locks

    def kept(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a grid, with what its codes keep to while they train: zeros, no lowest code."""
        calibrator = CALIBRATORS.get(self.calibrate)
        narrow = calibrator is not None and calibrator.narrow and bool(settings["symmetric"])
        return {**settings, "mask": self.locks, "narrow": narrow}

    @property
    def folds(self) -> bool:
        """What is packed is not the checkpoint as it is, but turned or smoothed (rotations/)."""
        return self.rotation.turns or self.smooth is not None

    @property
    def reads_rows(self) -> bool:
        """Something looks at quant.calibration before the base is there: its calibrator, or what chooses
        rotations and smoothing."""
        return self.reads_text or ROTATIONS[self.rotation.kind].needs_rows or self.smooth is not None

    def start(self, rows: bool) -> str:
        """What `calibrate: auto` is. rows: there is text to look at."""
        grid = GRIDS[self.grid]
        return grid.text_start if rows and self.bits in grid.text_bits else grid.start

    def resolved(self, rows: bool) -> QuantSection:
        """With auto replaced; what the recipe does not say stays unsaid: a quantized checkpoint may."""
        if self.calibrate != AUTO:
            return self
        section = self.model_copy(update={"calibrate": self.start(rows)})
        section.model_fields_set.discard("calibrate")
        return section

    @property
    def inputs(self) -> str:
        """What the layers' inputs are on, to be said behind what the weights are on."""
        found = self.activations
        return "" if found is None else f", inputs {found.bits} bit by {found.kind}"

    @property
    def by_block(self) -> bool:
        """Whether the calibrator rounds the linears of a decoder layer together."""
        return self.calibrate in CALIBRATORS and CALIBRATORS[self.calibrate].block is not None

    @property
    def from_checkpoint(self) -> bool:
        """The codes come with the checkpoint, which is quantized already (incoming.py)."""
        return self.calibrate == FROM_CHECKPOINT

    def skip_reason(self, layer_name: str, embedding: bool = False, convolution: bool = False) -> str | None:
        """Why a linear layer (or an embedding, or a convolution) stays in full precision, judged by its name;
        None: it is quantized.
        """
        if convolution and not self.convolutions:
            return "a convolution, which quant.convolutions: true packs"
        if embedding:
            if self.embeddings is None or not is_token_embedding(layer_name):
                return "embedding"
            outside = any(part.startswith(OTHER_TOWERS) for part in layer_name.split("."))
            return "not part of the language model" if outside else None
        if self.lm_head is not None and is_head(layer_name):
            return None
        for pattern in self.exclude:
            if matches(pattern, layer_name):
                return f"excluded by '{pattern}'"
        if isinstance(self.targets, list):
            return (
                None
                if any(matches(pattern, layer_name) for pattern in self.targets)
                else "not among quant.targets"
            )
        parts = layer_name.split(".")
        if not convolution and not any(part.isdecimal() for part in parts):
            return "not in a decoder layer"
        if parts[-1] in ("gate", "router") or "router" in parts:
            return "a router: its few weights choose the experts"
        if any(part.startswith(OTHER_TOWERS) for part in parts):
            return "not part of the language model"
        return None

    def grid_for(self, *names: str) -> Grid:
        """The grid of the layer that is known by these names (Matrix.names, its own first), overrides applied
        (of those that match the last one that says something of a key wins)."""
        settings = dict(self)
        for override in self.overrides:
            if override.means(names):
                settings |= override.given
        if self.embeddings is not None and is_token_embedding(names[0]):
            # It is not trained, so no rounding error is kept.
            return grid_of(self.grid, dict(self) | {"bits": self.embeddings, "residual_bits": 0})
        if is_head(names[0]):  # as in the papers of sparsity, it is not pruned
            if self.lm_head is not None:
                return grid_of(self.grid, settings | {"bits": self.lm_head})
            return grid_of(self.grid, self.kept(settings) | {"mask": False})
        return grid_of(self.grid, self.kept(settings))


def grids(r: Any) -> Iterator[tuple[KeyPath, Any]]:
    """(key path, grid) of the recipe's grid and of every override; those that cannot be are left to
    check_grid.
    """
    for path, settings in _settings(r.quant):
        try:
            yield path, grid_of(r.quant.grid, settings)
        except ValueError:
            continue


def _settings(quant: Any) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    settings = dict(quant)
    yield ("quant",), quant.kept(settings)
    for i, override in enumerate(quant.overrides):
        yield ("quant", "overrides", i), quant.kept(settings | override.given)


def packed_layers(quant: Any, shapes: Shapes) -> list[Layer]:
    """Every matrix that will be packed: linears (or the parts of fused ones that overrides take apart) and
    convolutions, then a head that is tied (no tensor of its own), then the embedding.
    """
    whole = shapes.packed(quant)
    layers = layers_apart(quant, whole, shapes)
    if quant.lm_head is not None and (head := shapes.head) is not None and head not in layers:
        layers.append(head)
    if quant.embeddings is not None and (embedding := shapes.token_embedding) is not None:
        layers.append(embedding)
    return layers


def check_grid(r: Any) -> Problems:
    """Bits and calibrator against the grid kind; patterns that cannot be read."""
    quant = r.quant
    chosen = GRIDS[quant.grid]
    for path, settings in _settings(quant):
        bits = settings["bits"]
        if bits not in chosen.widths:
            others = " or ".join(name for name, grid in GRIDS.items() if bits in grid.widths)
            yield Problem(
                (*path, "bits"),
                f"got {bits}; allowed on quant.grid {quant.grid}: {listed(chosen.widths)}; or "
                f"use quant.grid: {others}",
            )
            continue
        try:
            grid_of(quant.grid, settings)
        except ValueError as error:
            yield Problem((*path, "grid"), f"got {quant.grid!r}: {error}")
        if refused := chosen.refuses(settings):
            yield Problem((*path, refused[0]), refused[1])
    calibrator = CALIBRATORS.get(quant.calibrate)
    if quant.from_checkpoint or quant.calibrate == AUTO:
        pass  # incoming.py has looked; auto takes what fits
    elif calibrator is None:
        fits = [AUTO, *calibrators_of(chosen.kind)]
        yield Problem(
            ("quant", "calibrate"),
            f"got {quant.calibrate!r}; allowed: {listed(fits)}{did_you_mean(quant.calibrate, fits)}",
        )
    else:
        for _, grid in grids(r):
            reason = calibrator.reject(grid)
            if reason:
                yield Problem(("quant", "calibrate"), f"got {quant.calibrate!r}, which {reason}")
                break
    for key in ("targets", "exclude"):
        patterns = getattr(quant, key)
        for i, pattern in enumerate(patterns if isinstance(patterns, list) else []):
            if error := pattern_error(pattern):
                yield Problem(
                    ("quant", key, i),
                    f"got {pattern!r}, not a name, glob or regex ({error}); escape it with \\",
                )


def check_layers(r: Any) -> Problems:
    """Targets, exclusions and overrides that match nothing."""
    quant, shapes = r.quant, shapes_here(r.model.path, r.model.revision)
    if shapes is None or not shapes.products(quant):
        return
    names = [layer.name for layer in shapes.products(quant)]
    for key, layer in (("lm_head", shapes.head), ("embeddings", shapes.token_embedding)):
        if getattr(quant, key) is not None and layer is None:
            yield Problem(
                ("quant", key),
                f"got {getattr(quant, key)}, but this model's files have no such tensor; set it to null",
            )
    # tied to the embedding it has no weight of its own in the file, but it is a layer all the same
    head = "lm_head"
    for key in ("targets", "exclude"):
        patterns = getattr(quant, key)
        for i, pattern in enumerate(patterns if isinstance(patterns, list) else []):
            if not any(matches(pattern, name) for name in [*names, head]) and not pattern_error(pattern):
                near = nearest_layers(pattern, [*names, head])
                yield Problem(("quant", key, i), f"got {pattern!r}, which matches no linear layer{near}")
    targets = shapes.packed(quant)
    if not targets:
        yield Problem(
            ("quant", "targets"),
            f"got {quant.targets!r} less exclude: no layer is left; the model has {kinds_of(names)}",
        )
    yield from check_overrides(quant, targets, names, shapes)


def check_groups(r: Any) -> Problems:
    """Group sizes that leave a shorter last group in some layer, for a format that holds no such group."""
    shapes = shapes_here(r.model.path, r.model.revision)
    if shapes is None:
        return
    exporter, targets = EXPORTERS[r.export.format], packed_layers(r.quant, shapes)
    misfits: dict[tuple[int, int], list[str]] = {}
    for layer in targets:
        try:
            grid = r.quant.grid_for(*layer.names)
        except ValueError:
            continue  # bits the grid does not have: check_grid told
        size = grid.group_size
        if not layer.divides(size) and exporter.reject_width(grid, layer.in_features):
            misfits.setdefault((size, layer.in_features), []).append(layer.name)
    widths = {layer.in_features for layer in targets}
    for (size, width), names in misfits.items():
        fits = [str(g) for g in GROUP_SIZES if all(w % g == 0 for w in widths)] + ["-1"]
        alone = [str(g) for g in GROUP_SIZES if width % g == 0] + ["-1"]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield Problem(
            ("quant", "group_size"),
            f"got {size}, which does not divide the {width} inputs of {names[0]}{more}; allowed for all "
            f"layers: {', '.join(fits)}; "
            f"or an override for these layers ({', '.join(alone)}), or export.format: native (its last "
            "group may be shorter)",
        )
