"""Scheme and Activation: what the input of a packed layer is put on, between x and the packed op.

    q  = clamp(round(x (1 / s) + z), -2^(b-1), 2^(b-1) - 1)    int8 codes, signed also where b < 8
    x^ = s (q - z)                                             z = 0 when symmetric

1 / s is rounded before it multiplies, as in vLLM's kernels: the symmetric codes per token are theirs bit for
bit (tried in fp32 and bf16; with a zero point theirs come of a fused multiply-add, and 1 in 10,000 ties of
bf16 falls otherwise).
s and z are made of x itself (dynamic) or came with the scheme (static). All of it in fp32, whatever the model
computes in; x^ has the dtype of x. The backward is straight-through: the gradient of x^ is that of x where x
lies in the range, zero where it was clipped.
Nothing flows into s, unless the scheme says that it learns (learned.py): a static s, or the factor on the
range that a dynamic one covers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model.linear import InputGrid

BITS = (3, 4, 6, 8)  # of a code; each is an int8, of which narrower ones use the middle

_KEPT = "_lowbit_quantized"  # the attribute of x that holds its x^, by scheme
_CODES = "_lowbit_codes"  # and the one that holds its codes


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Everything that makes codes of x: hashable, without tensors, JSON in the configuration of a folder.

    group_size: channels that share a scale (kind group; -1: all). clip: the factor on the range that a
    dynamic scale covers, or one for each segment. scale, zero: of a static kind; the scale's values are those
    of its shipping dtype.
    segments: how many channels each segment of the input has that is scaled by itself (segmented.py; (): all
    as one). scale and zero are then those of the segments, one behind the other.
    mask: the gradient is zero where |x| is at least this, although nothing is clipped there (training only).
    learn: a static scale trains, or the clip of dynamic ones; the first of the layers that share it, by name
    (training only).
    """

    kind: str
    bits: int
    symmetric: bool = True
    dynamic: bool = True
    group_size: int = -1
    clip: float | tuple[float, ...] = 1.0
    scale: tuple[float, ...] = ()
    zero: tuple[int, ...] = ()
    segments: tuple[int, ...] = ()
    mask: float | None = None
    learn: str | None = None

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def calibrated(self) -> bool:
        """Whether codes can be made: a static scheme needs its scale first."""
        return self.dynamic or bool(self.scale)

    @property
    def clips(self) -> tuple[float, ...]:
        """The factor of all, or of each segment."""
        return self.clip if isinstance(self.clip, tuple) else (self.clip,)

    @property
    def whole_range(self) -> bool:
        """Whether the clip is no factor at all, and stays so."""
        return set(self.clips) == {1.0} and (self.learn is None or not self.dynamic)

    def part(self, number: int) -> Scheme:
        """What a segment is on."""
        count = len(self.segments)
        scales, zeros = len(self.scale) // count, len(self.zero) // count
        return replace(
            self,
            segments=(),
            clip=self.clip[number] if isinstance(self.clip, tuple) else self.clip,
            scale=self.scale[number * scales : (number + 1) * scales],
            zero=self.zero[number * zeros : (number + 1) * zeros],
        )

    def shipped(self) -> Scheme:
        """Without what only training reads."""
        return replace(self, mask=None, learn=None)

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults, and kind and bits."""
        default = Scheme(kind=self.kind, bits=self.bits)
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if key in ("kind", "bits") or value != getattr(default, key)
        }

    def __str__(self) -> str:
        parts = [f"A{self.bits}", self.kind]
        parts += [f"g{self.group_size}"] if self.group_size != -1 else []
        parts += [f"{len(self.segments)} segments"] if self.segments else []
        parts += [] if self.symmetric else ["asym"]
        parts += [] if self.dynamic else ["static" if self.learn is None else "static, learned"]
        ends = dict.fromkeys(f"{clip:g}" for clip in (min(self.clips), max(self.clips)))
        parts += [] if self.whole_range else ["clip " + " to ".join(ends)]
        parts += ["learned"] if self.dynamic and self.learn is not None else []
        return " ".join(parts)


class Activation(InputGrid):
    """The quantizer of one input. A kind defines `scales`, and `step_and_zero` where scales are not [..., 1].

    No buffers and no parameters: a state dict does not know it. A scale that learns lies in an adapter.
    """

    kind: ClassVar[str]
    static_scales: ClassVar[int] = 0  # how many numbers a static scale is; 0: the kind is dynamic
    can_be_asymmetric: ClassVar[bool] = True
    learned: Any = None  # a LearnedScale or a LearnedClip
    given: Callable[[torch.device], Tensor] | None = None  # of a segment: where it has its clip from
    numbers: Callable[[str], Tensor] | None = None  # in a graph: its static "scale" and "zero"
    products: ClassVar[int] = 1  # that a server makes with the weight's codes; 3: one per group or segment
    by_rows: ClassVar[bool] = True  # scales that are not static are made of the last dimension alone
    in_segments: ClassVar[bool] = True  # segments of an input may have scales of their own

    @classmethod
    def cost(cls, scheme: Scheme) -> tuple[int, bool]:
        """What orders schemes by what they cost a server: products, then the correction for a zero point."""
        return max(cls.products, 3) if scheme.segments else cls.products, not scheme.symmetric

    def __init__(self, scheme: Scheme):
        super().__init__()
        assert scheme.kind == self.kind, f"{scheme.kind} scheme for {type(self).__name__}"
        self._scheme = scheme
        self.learn(None)

    @property
    def one_scale(self) -> bool:
        return self.products == 1 and self._scheme.symmetric and not self._scheme.segments

    def scheme(self) -> Scheme:
        """What it was made of: of a scale that learns, the start."""
        return self._scheme

    @torch.no_grad()
    def shipped(self) -> Scheme:
        """What an exporter writes: scale or clip of the last forward, nothing that only training reads."""
        made = self._scheme.shipped()
        if self.learned is None:
            return made
        found = tuple(self.learned().tolist())
        if made.dynamic:
            return replace(made, clip=found if made.segments else found[0])
        return replace(made, scale=found)

    def learn(self, learned: Any) -> None:
        """Take the static scale or the clip from what learns it, part of another module; None: from the
        scheme."""
        vars(self)["learned"] = learned  # not by setattr, which would make it a part of this one too

    def static(self, device: torch.device) -> Tensor:
        """The static scale, fp32 [static_scales]."""
        if self.learned is not None:
            return self.learned()
        if self.numbers is not None:
            return self.numbers("scale")
        assert len(self._scheme.scale) == self.static_scales, "a static scale that no calibration gave"
        return torch.cat([torch.full((1,), value, device=device) for value in self._scheme.scale])

    def static_zero(self, device: torch.device) -> Tensor | None:
        """The static zero point, fp32 [1]; None: there is none."""
        if not self._scheme.zero:
            return None
        if self.numbers is not None:
            return self.numbers("zero")
        return torch.full((1,), float(self._scheme.zero[0]), device=device)

    def clip(self, device: torch.device) -> Tensor | float:
        """The factor on a dynamic range, without gradient: a number, or fp64 that multiplies the ranges."""
        if self.given is not None:
            return self.given(device)
        if self._scheme.dynamic and self.learned is not None:
            return self.learned.value().double()
        assert not isinstance(self._scheme.clip, tuple), "one clip per segment"
        return self._scheme.clip

    def cover(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """(scale, zero) that cover [low, high] times the clip."""
        clip = self.clip(low.device)
        return ranges(low, high, self._scheme, clip.float() if isinstance(clip, Tensor) else clip)

    def summed(self, values: Tensor) -> Tensor:
        """values [..., K] -> their sum [1], or those of the segments."""
        return values.sum()[None]

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x fp32 [..., K] -> (scale fp32, zero fp32 | None), as `codes` gives them."""
        raise AssertionError(f"{type(self).__name__} has no scales")

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """Scales or zeros as `scales` gives them, in a shape that multiplies x [..., K]."""
        return values

    def first(self, x: Tensor) -> Tensor | None:
        """Where the first of two static scales is used, bool [..., K]; None: there is one."""
        return None

    @staticmethod
    def collect(values: Tensor, first: Tensor | None) -> Tensor:
        """`spread` turned round, for gradients: values [..., K] -> their sums [static_scales]."""
        if first is None:
            return values.sum()[None]
        return torch.stack((values.masked_fill(~first, 0).sum(), values.masked_fill(first, 0).sum()))

    @torch.no_grad()
    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [..., K] -> (codes int8 [..., K], scale fp32, zero int32 | None): x^ = scale (codes - zero). The
        zero of a token whose values are far from 0 is beyond the codes."""
        x = x.float()
        scale, zero = self.scales(x)
        codes = x * self.spread(1 / scale, x)
        if zero is not None:
            codes += self.spread(zero, x)
        codes.round_().clamp_(self._scheme.lowest, self._scheme.highest)
        return codes.to(torch.int8), scale, None if zero is None else zero.to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> x^ [..., K], straight-through. Layers that are given the very same x (q, k and v)
        share one x^: it hangs on x, and goes with it."""
        # A compiler shares by itself; nothing tells when an inference tensor is written to; and a leaf is
        # held by its own gradient's node, so what hangs on it would hold it for ever.
        if torch.compiler.is_compiling() or x.is_inference() or (x.is_leaf and x.requires_grad):
            return self.quantize(x)
        return self._held(x, _KEPT, self.quantize)

    def shared_codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where `one_scale`: x [..., K] -> (codes int8, scale fp32 [..., 1]), shared like x^."""
        if torch.compiler.is_compiling() or x.is_inference() or (x.is_leaf and x.requires_grad):
            return self._whole_codes(x)
        return self._held(x, _CODES, self._whole_codes)

    def _whole_codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """No byte is a NaN, so the scale of a token that holds one is: its products are then NaN too, as
        with x^."""
        codes, scale, _ = self.codes(x)
        return codes, torch.where(x.isnan().any(-1, keepdim=True), torch.nan, scale)

    def _held(self, x: Tensor, name: str, make: Callable[[Tensor], Any]) -> Any:
        """make(x), kept on x under a name for who asks again."""
        held = getattr(x, name, None)
        # The last: which backward this is part of (-1: none). Gradient checkpointing forwards again there and
        # has to come by the tensors that it kept: x^ of the first forward would leave some out.
        backward = torch._C._current_graph_task_id()  # pyright: ignore[reportAttributeAccessIssue]
        key = (self.key, x._version, torch.is_grad_enabled(), backward)
        if held is None or held[0] != key:
            held = (key, make(x))
            setattr(x, name, held)
        return held[1]

    @property
    def key(self) -> Any:
        """Quantizers of one key make the same x^ of the same x."""
        return self._scheme if self.learned is None else (self._scheme, self.learned.version)

    def quantize(self, x: Tensor) -> Tensor:
        """x -> x^, straight-through."""
        wide = x.detach().float()  # so that only what learns has a gradient
        scale, zero = self.scales(wide)
        clip = self.learned() if self._scheme.dynamic and self.learned is not None else None
        beyond = None if self._scheme.mask is None else wide.abs() >= self._scheme.mask
        del wide
        return _StraightThrough.apply(x, scale, zero, beyond, clip, self)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return str(self._scheme)


class _StraightThrough(torch.autograd.Function):
    """x^ forward; backward the gradient where x was in the range. The mask is kept only where something can
    be outside; d x^ / d s, in the dtype of x, only where s learns, or clip d x^ / d clip = s d x^ / d s
    where the clip does: s is in proportion to it, and a zero point does not depend on it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        outside: Tensor | None,
        clip: Tensor | None,
        activation: Activation,
    ) -> Tensor:
        scheme, wide = activation.scheme(), x.float()
        spread, inverse = activation.spread(scale, wide), activation.spread(1 / scale, wide)
        shift = None if zero is None else activation.spread(zero, wide)
        # Of 16 bits `wide` is our own: codes are made in its place, so one fp32 copy is all there is.
        codes = wide * inverse if wide is x else wide.mul_(inverse)
        if shift is not None:
            codes += shift
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[4]
        exact = codes.clone() if learns else None
        codes.round_()
        clipped = None
        if not scheme.dynamic or min(scheme.clips) < 1 or clip is not None:  # else nothing can be outside
            clipped = (codes < scheme.lowest) | (codes > scheme.highest)
            outside = clipped if outside is None else outside | clipped
        codes.clamp_(scheme.lowest, scheme.highest)
        slope = None
        if exact is not None:
            assert clipped is not None
            slope = torch.where(clipped, codes if shift is None else codes - shift, codes - exact)
            slope = slope if clip is None else slope.mul_(spread)
            slope = slope.to(x.dtype)  # not x: x^ hangs on x, and a node of x^ that keeps x closes a circle
        if shift is not None:
            codes -= shift
        ctx.activation = activation
        static = slope is not None and clip is None
        ctx.save_for_backward(outside, slope, activation.first(x) if static else None, clip)
        return codes.mul_(spread).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        outside, slope, first, clip = ctx.saved_tensors
        into_scale = into_clip = None
        if slope is not None:
            pull = slope.float().mul(gradient.float())
            if clip is None:
                into_scale = ctx.activation.collect(pull, first)
            else:
                into_clip = ctx.activation.summed(pull) / clip
        if outside is not None:
            gradient = gradient.masked_fill(outside, 0)
        return gradient, into_scale, None, None, into_clip, None


def positive(scale: Tensor) -> Tensor:
    """Where all of x is zero its scale is 1: the codes are zero."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def ranges(
    low: Tensor, high: Tensor, scheme: Scheme, clip: Tensor | float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) that cover [low, high] times clip. With a zero point the range is that of the
    values, which need not hold 0, as in vLLM; but where they are all but equal, 0 is in it."""
    if scheme.symmetric:
        return positive(torch.maximum(high, -low) * clip / scheme.highest), None
    alike = (high - low) * 256 < torch.maximum(high, -low)
    low = torch.where(alike, low.clamp(max=0), low) * clip
    high = torch.where(alike, high.clamp(min=0), high) * clip
    scale = positive((high - low) / (scheme.highest - scheme.lowest))
    return scale, torch.round(scheme.lowest - low / scale)
