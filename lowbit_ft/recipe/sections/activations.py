"""quant.activations: what the inputs of the packed layers are on, and whether somebody computes that."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ...activations import ACTIVATIONS, Scheme
from ...activations.calibrate import RANGES
from ...export import EXPORTERS
from ...export.compressed_tensors import FUSED
from ...model.roles import is_head
from ...names import matches, nearest_layers, pattern_error
from ..layers import shapes_here
from ..values import OneOf
from ..yaml import KeyPath, Problem
from .base import Positive, Problems, Section
from .segments import segments_of_shapes

AUTO = "auto"
_TABLE: Any = ACTIVATIONS
KINDS = ChainMap({AUTO: None}, _TABLE)  # what is added to the table is known here too
Clip = Annotated[float, Field(gt=0, le=1)]
Channels = Literal[32, 64, 128, 256]
Kind = Annotated[str, OneOf(KINDS)]
Bits = Literal[3, 4, 6, 8]  # activations.base.BITS


class ActivationOverride(Section):
    """Another scheme for the inputs of the layers that match."""

    match: str = Field(min_length=1, description="glob over layer names, for example '*.down_proj'")
    bits: Bits | None = Field(default=None, description="bits for these layers")
    kind: Kind | None = Field(default=None, description="kind for these layers")
    symmetric: bool | None = Field(default=None, description="whether these layers have no zero point")
    group_size: Channels | None = Field(default=None, description="channels that share a scale here")

    @model_validator(mode="after")
    def _says_something(self) -> ActivationOverride:
        if all(getattr(self, key) is None for key in ("bits", "kind", "symmetric", "group_size")):
            raise ValueError(
                "an override that changes nothing; set bits, kind, symmetric or group_size, or drop it"
            )
        return self


class ActivationsSection(Section):
    """What the inputs of the packed layers are on while they train, and where they are served."""

    bits: Bits = Field(default=8, description="bits of an input's codes")
    kind: Kind = Field(
        default="token",
        description="token: a scale per token; group: per token and group of channels; tensor: one scale; "
        "dual: one for negative and one for positive values; auto: per layer the one with the least output "
        "error on calibration rows among those that export.format carries",
    )
    symmetric: bool = Field(
        default=True, description="no zero points; servers compute symmetric inputs (auto tries both)"
    )
    dynamic: bool = Field(
        default=True,
        description="scales made of the input itself; false: static ones, from calibration rows (kinds "
        "tensor and dual)",
    )
    range: Annotated[str, OneOf(RANGES)] = Field(
        default="moving_average",
        description="what a static scale covers of the calibration rows; lsq: LSQ's start for one that "
        "trains, 2 mean |x| / sqrt(largest code)",
    )
    learn: bool = Field(
        default=False,
        description="static scales (LSQ), or the clip factors of dynamic ones, train with the adapters, at "
        "train.scale_learning_rate; what calibration found, or clip, is their start",
    )
    targets: Literal["all"] | list[str] = Field(
        default="all",
        description="all: the inputs of all packed layers but the output head; or names, globs, regexes",
    )
    overrides: list[ActivationOverride] = Field(
        default=[], description="another scheme for some layers; the last match wins"
    )
    clip: Clip | list[Clip] = Field(
        default=1.0,
        description="factor on the range of a dynamic scale; of a list, per layer the one with the least "
        "output error on calibration rows",
    )
    group_size: Channels = Field(default=128, description="kind group: channels that share a scale")
    segments: Literal["auto", "none"] = Field(
        default="none",
        description="auto: scales of their own for the segments of which an input is put together, such as "
        "the heads before an attention's output projection",
    )
    grad_mask: Positive | None = Field(
        default=None,
        description="no gradient where |x| is at least this (LLM-QAT: 2, though nothing is clipped there)",
    )

    @field_validator("clip")
    @classmethod
    def _some(cls, value: float | list[float]) -> float | list[float]:
        if value == []:
            raise ValueError("an empty list; give a factor, such as 1.0, or several")
        return value

    def applies(self, layer_name: str) -> bool:
        """Whether the input of the packed layer of that name is quantized."""
        if self.targets == "all":
            return not is_head(layer_name)
        return any(matches(pattern, layer_name) for pattern in self.targets)

    def schemes(self, layer_name: str, widths: tuple[int, ...] = (), **changes: Any) -> list[Scheme]:
        """What may be for that layer, before calibration, in the order in which it is tried. widths: of the
        segments of its input. ValueError for a scheme that cannot be."""
        values: dict[str, Any] = {key: getattr(self, key) for key in ("bits", "kind", "symmetric")}
        values["group_size"] = self.group_size
        for override in self.overrides:
            if matches(override.match, layer_name):
                values |= {k: v for k, v in override if k != "match" and v is not None}
        values |= changes
        return self._made(widths if self.segments == "auto" else (), **values)

    def _made(
        self, widths: tuple[int, ...], bits: int, kind: str, symmetric: bool, group_size: int
    ) -> list[Scheme]:
        found = []
        for name, cls in ACTIVATIONS.items():
            if kind not in (name, AUTO) or kind == AUTO and not self._tried(name):
                continue
            for flat in (True, False) if kind == AUTO and cls.can_be_asymmetric else (symmetric,):
                found += [
                    Scheme(
                        kind=name,
                        bits=bits,
                        symmetric=flat or kind == AUTO and not cls.can_be_asymmetric,
                        dynamic=self.dynamic,
                        group_size=group_size if name == "group" else -1,
                        clip=clip,
                        segments=segments,
                        mask=self.grad_mask,
                    )
                    for segments in _tried(widths if cls.in_segments else (), kind == AUTO)
                    for clip in self.clips
                ]
        return found

    def asked(self, scheme: Scheme) -> Scheme:
        """What a format has to carry of a candidate: one whose clip learns ships another."""
        return replace(scheme, learn="") if self.learn else scheme

    def planned(self, layer_name: str, widths: tuple[int, ...] = ()) -> Scheme | None:
        """A scheme that holds as much memory in training as the one that calibration will choose, or more;
        None: the input stays as it is."""
        if not self.applies(layer_name):
            return None
        one = min(self.schemes(layer_name, widths), key=lambda scheme: scheme.clip)
        ends, each = {"tensor": (1.0,), "dual": (1.0, 1.0)}, max(1, len(one.segments))
        zero = () if one.symmetric else (0,) * each
        learn = shared_input(layer_name) if self.learn else None
        one = replace(one, learn=learn)
        return one if one.dynamic else replace(one, scale=ends[one.kind] * each, zero=zero)

    def _tried(self, kind: str) -> bool:
        """Whether auto tries that kind: a dynamic scale per tensor depends on what else is in the batch."""
        return kind != "tensor" if self.dynamic else ACTIVATIONS[kind].static_scales > 0

    @property
    def by_batch(self) -> bool:
        """Whether a token's input depends on the other tokens of its batch."""
        kinds = {self.kind, *(override.kind for override in self.overrides)}
        return self.dynamic and any(name in kinds and not kind.by_rows for name, kind in ACTIVATIONS.items())

    @property
    def clips(self) -> list[float]:
        return self.clip if isinstance(self.clip, list) else [self.clip]

    @property
    def reads_text(self) -> bool:
        """Whether calibration rows decide something, be it who is given one tensor."""
        kinds = [self.kind, *(override.kind for override in self.overrides)]
        return not self.dynamic or self.learn or AUTO in kinds or len(self.clips) > 1


def shared_input(layer_name: str) -> str:
    """The first of the layers that are given one tensor, before anything has run: by the names that servers
    fuse. In other architectures a plan counts a number too many for each layer more."""
    stem, dot, last = layer_name.rpartition(".")
    return stem + dot + next((members[0] for members in FUSED if last in members), last)


def _tried(widths: tuple[int, ...], both: bool) -> list[tuple[int, ...]]:
    """The segments that a kind is tried with: none, those that there are, or (kind auto) both."""
    return [(), widths] if both and widths else [widths]


def carried(
    section: ActivationsSection,
    layer_name: str,
    grid: Any,
    width: int,
    format: str,
    widths: tuple[int, ...] = (),
) -> list[Scheme]:
    """The schemes of a layer with `width` inputs in segments of `widths`, for kind auto those that the export
    format carries (all where it carries none, which check_activations refuses)."""
    found = section.schemes(layer_name, widths)
    fits = [s for s in found if EXPORTERS[format].reject_activation(section.asked(s), grid, width) is None]
    return fits or found


def check_activations(r: Any) -> Problems:
    """The kinds against their options, and the schemes of all layers against the export format."""
    section = r.quant.activations
    if section is None:
        return
    yield from _check_options(section)
    for key in [] if section.targets == "all" else section.targets:
        if error := pattern_error(key):
            yield Problem(
                ("quant", "activations", "targets"),
                f"got {key!r}, not a name, glob or regex ({error}); escape it with \\",
            )


def check_activation_layers(r: Any) -> Problems:
    """Patterns that match no packed layer, and what the export format cannot carry of the rest."""
    section, exporter = r.quant.activations, EXPORTERS[r.export.format]
    if section is None and exporter.needs_activations:
        yield Problem(
            ("export", "format"),
            f"got {exporter.name!r}, whose servers take quantized inputs only; set quant.activations: "
            "{bits: 8}, or export.format: compressed-tensors",
        )
    if section is None or any(True for _ in check_activations(r)):
        return
    shapes = shapes_here(r.model.path, r.model.revision)
    packed = {}
    if shapes is not None:
        # whole: parts have one input
        packed = {layer.name: layer.in_features for layer in shapes.packed(r.quant)}
        names = list(packed)
        patterns = [] if section.targets == "all" else list(section.targets)
        for path, pattern in [(("targets",), p) for p in patterns] + [
            (("overrides", i, "match"), o.match) for i, o in enumerate(section.overrides)
        ]:
            if names and not any(matches(pattern, name) for name in names):
                yield Problem(
                    ("quant", "activations", *path),
                    f"got {pattern!r}, which matches no packed layer{nearest_layers(pattern, names)}",
                )
    if section.learn and packed and not any(section.applies(n) and r.adapter.trains(n) for n in packed):
        yield Problem(
            ("quant", "activations", "learn"),
            "got true, but no layer has both an adapter and a quantized input, so none of them trains; widen "
            "adapter.targets or quant.activations.targets, or drop learn",
        )
    found = segments_of_shapes(shapes) if section.segments == "auto" else {}
    widths = {name: one.widths for name, one in found.items()}
    yield from _check_export(r, section, packed, widths)


def _check_options(section: ActivationsSection) -> Problems:
    root: KeyPath = ("quant", "activations")
    given: list[tuple[KeyPath, str, bool]] = [(root, section.kind, section.symmetric)]
    for i, one in enumerate(section.overrides):
        symmetric = section.symmetric if one.symmetric is None else one.symmetric
        given.append(((*root, "overrides", i), one.kind or section.kind, symmetric))
    static = ", ".join(name for name, kind in ACTIVATIONS.items() if kind.static_scales)
    for path, kind, symmetric in given:
        if kind == AUTO:
            continue
        if not section.dynamic and not ACTIVATIONS[kind].static_scales:
            yield Problem(
                (*path, "kind"),
                f"got {kind!r} with dynamic: false; static kinds: {static}, or set dynamic: true",
            )
        if not symmetric and not ACTIVATIONS[kind].can_be_asymmetric:
            yield Problem(
                (*path, "kind"),
                f"got {kind!r} with symmetric: false, which has two scales in place of a zero point; drop "
                "symmetric, or use kind: token",
            )
    if (
        section.segments == "auto"
        and section.kind in ACTIVATIONS
        and not ACTIVATIONS[section.kind].in_segments
    ):
        yield Problem(
            (*root, "segments"),
            f"got 'auto' with kind: {section.kind}, whose groups have scales of their own already; set kind: "
            "token, or segments: none",
        )
    if not section.dynamic and section.clips != [1.0]:
        yield Problem(
            (*root, "clip"),
            f"got {section.clip!r} with dynamic: false; a static scale is set by `range`: use range: mse",
        )
    if section.segments == "auto" and section.learn and not section.dynamic:
        yield Problem(
            (*root, "learn"),
            "got true with segments: auto; the static scales of segments stay what calibration found: drop "
            "learn, set segments: none, or dynamic: true, where the clips of segments learn",
        )
    if section.range == "lsq" and not all(symmetric for _, _, symmetric in given):
        yield Problem(
            (*root, "range"), "got 'lsq' with symmetric: false; it knows no zero point: set range: mse"
        )
    if section.range == "lsq" and any(kind == AUTO for _, kind, _ in given):
        yield Problem(
            (*root, "range"),
            "got 'lsq' with kind: auto, which tries zero points, and lsq knows none: set kind: tensor or "
            "dual, or range: mse",
        )
    if section.range == "lsq" and not section.learn:
        yield Problem(
            (*root, "range"),
            "got 'lsq' without learn, which is where a scale begins that trains; set learn: true, or range: "
            "mse",
        )
    if section.dynamic and section.range != type(section).model_fields["range"].default:
        yield Problem(
            (*root, "range"), f"got {section.range!r} with dynamic: true; it is of static scales: drop it"
        )


def _check_export(
    r: Any, section: ActivationsSection, packed: dict[str, int], widths: dict[str, tuple[int, ...]]
) -> Problems:
    """What the format cannot carry, once per reason."""
    exporter, told = EXPORTERS[r.export.format], set()
    for name, width, grid in _grids(r, packed):
        if name and not section.applies(name):
            continue
        reasons = [
            exporter.reject_activation(section.asked(s), grid, width)
            for s in section.schemes(name, widths.get(name, ()))
        ]
        if None in reasons and AUTO in (section.kind, *(o.kind for o in section.overrides)):
            continue
        for reason in reasons:
            if reason is not None and reason not in told:
                told.add(reason)
                where = f" (for {name})" if name else ""
                yield Problem(
                    ("quant", "activations"), f"got export.format: {r.export.format}{where}: {reason}"
                )


def _grids(r: Any, packed: dict[str, int]) -> Iterator[tuple[str, int | None, Any]]:
    """(layer, inputs, grid as it ships) of every packed layer; of a model that is not here the recipe's."""
    config = getattr(r, "adapter", None)
    for name, width in packed.items() or [("", None)]:
        try:
            grid = r.quant.grid_for(name)
        except ValueError:
            continue  # bits the grid does not have: check_grid told
        if config is not None and config.grid_name == grid.kind and config.trains(name):
            grid = config.shipped(grid)
        yield name, width, grid
