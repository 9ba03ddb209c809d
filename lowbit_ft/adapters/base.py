"""What every adapter is: a config that can refuse a grid, and a module that owns only trainable tensors.

An adapter says what it wants of the base through `grid_args` (integers) or `plane_args` (sign planes). The
forward and the merge are written once, here, and both hand the same arguments to the same ops: that is why
what is trained is what ships.

Letters: N out features, K in features, G groups per row, g group size, r rank. Masters are fp32.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from lowbit_kernels import exact_exp
from pydantic import ConfigDict, Field, PrivateAttr, model_validator
from torch import Tensor, nn

from ..grid import BinaryWeight, Grid, GridArgs, IntGrid, PackedWeight, PlaneArgs, Weight
from ..grid.estimators import cast_scale, scale_gradient
from ..model.linear import WeightAdapter
from ..names import matches
from ..segments import Parts
from . import latent
from .carry import Carried
from .masks import against_kept
from .modules import modules_field
from .patterns import AlphaPattern
from .step_codes import StepCodes
from .token_rows import TokenRows
from .uncounted import say_uncounted

# Of the methods here; one with others says so in its config. log_input_*: of activations/learned.py.
SCALE_PARAMETERS = frozenset("log_scale magnitude offset plane_scale log_input_scale log_input_clip".split())


class AdapterConfig(TokenRows):
    """The `adapter` section of a recipe. Subclasses add their own keys; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grid_name: ClassVar[str] = "integer"  # the kind of grids it trains on (IntGrid.kind)
    exact_merge: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True  # moves weights by GridArgs alone, so that a mask holds (masks.py)
    prunes: ClassVar[bool] = False  # makes all codes anew, so that zeros may come while it trains (pruned.py)
    rounds_codes: ClassVar[bool] = True  # the forward makes codes, which train.keep_codes can keep

    # Those that train.scale_learning_rate is for, by the last component of their name.
    scale_parameters: ClassVar[frozenset[str]] = SCALE_PARAMETERS

    # What D = alpha / rank * B A counts: "weight" units or "grid" steps; None: there is no such product.
    delta_unit: ClassVar[Literal["weight", "grid"] | None] = None
    # Its parameters that move the values which are rounded; none: its codes stay, or it has none.
    code_parameters: ClassVar[frozenset[str]] = frozenset()
    ternary: ClassVar[bool] = False  # its numbers are -1, 0 and 1, for an optimizer that keeps them there
    reads_residual: ClassVar[bool] = True  # a base's residual bits are a part of what it trains on
    dense_delta: ClassVar[bool] = False  # D is a trained tensor of its own, `delta`, in grid steps

    method: str
    targets: list[str] | None = Field(
        default=None,
        description="names, globs or regexes of packed layers that train; null: all. The others ship the "
        "codes they came with",
    )
    modules_to_save: list[str] | None = modules_field()

    def trains(self, *names: str) -> bool:
        """Whether the packed layer that is known by these names gets an adapter."""
        return self.targets is None or any(matches(p, name) for p in self.targets for name in names)

    def of_layer(self, layer_name: str) -> "AdapterConfig":
        """What the adapter of the layer of that name is built from."""
        return self

    def reject(self, grid: Grid) -> str | None:
        """Why this method cannot train on this grid, with the way out; None when it can."""
        if grid.kind != self.grid_name:
            return f"{self.method} trains on {self.grid_name} grids: set quant.grid: {self.grid_name}"
        return against_kept(self, grid) if isinstance(grid, IntGrid) else None

    def shipped(self, grid: Grid) -> Grid:
        """The grid of the merged weight (residual and mask never ship)."""
        return grid.deployed if isinstance(grid, IntGrid) else grid

    @property
    def ships_offset(self) -> bool:
        """The merged weight carries a float offset, which only the native format can hold."""
        return False

    def build(self, base: Weight, weight: Tensor | None = None) -> "Adapter":
        """A fresh adapter for one layer. weight [N, K]: the dense one, read only when `wants_weight`."""
        raise AssertionError(f"{type(self).__name__} must define build")

    @property
    def wants_weight(self) -> bool:
        return False

    @property
    def trains_scales(self) -> bool:
        """Scales, magnitudes or offsets of the weights are among what trains."""
        return getattr(self, "train_scale", True)

    @property
    def changes_rows(self) -> bool:
        """Which rows train is chosen anew while they do, and an optimizer's averages move with them."""
        return False

    def over(self, bases: Iterable[tuple[str, Weight]]) -> "Mapping[str, AdapterConfig]":
        """The config that builds each layer's adapter, by name, where what a layer gets depends on the
        others. Asked with all layers that train, before the first is built.
        """
        return {name: self for name, _ in bases}


class ScaleOptions(AdapterConfig):
    """Options of every method that trains group scales."""

    train_scale: bool = Field(True, description="train the group scales (false: only the low-rank part)")
    lsq_gradient_scaling: bool = Field(
        False, description="multiply scale gradients by 1/sqrt(g * Qp) (LSQ); Adam makes it nearly inert"
    )
    scale_grad_tokens: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the tokens, drawn anew in every backward, that scales and offsets learn from "
        "(unbiased): the product that their gradient costs shrinks to that share. Methods with A and B: with "
        "low_rank_gradient factorised or corrected",
    )

    def gradient_options(self) -> dict[str, Any]:
        """What GridArgs is told of cheaper gradients (lowbit_kernels/estimates.py)."""
        return {"scale_grad_tokens": self.scale_grad_tokens}

    def scale_gradient_factor(self, base: Weight) -> float:
        if not self.lsq_gradient_scaling:
            return 1.0
        size = base.shape[1] if base.grid.group_size == -1 else base.grid.group_size
        return 1.0 / math.sqrt(size * max(1, (1 << (base.grid.bits - 1)) - 1))


def init_from_field() -> Any:
    return Field(
        default=None, description="folder of a PEFT LoRA whose A and B this run starts from (lora_start.py)"
    )


class LowRankOptions(ScaleOptions, AlphaPattern):
    """Options of every method with a low-rank product D = alpha / rank * B A."""

    delta_unit: ClassVar[Literal["weight", "grid"] | None] = "weight"
    code_parameters: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    prunes: ClassVar[bool] = True
    live_grid: ClassVar[bool] = False  # the base is re-gridded with the trained scale (units "live")

    rank: int = Field(16, ge=1, le=1024)
    alpha: float = Field(16.0, gt=0, description="D = alpha / rank * B A")
    init: Literal["zero", "svd", "loftq"] = Field(
        "zero",
        description="zero: A Kaiming, B 0. svd: A from the rounding error's row space, B 0. "
        "loftq: A and B from the SVD of the rounding error (residual_bits 0 only)",
    )
    clip: Literal["round_then_clip", "clip_then_round"] = "round_then_clip"
    segments: Literal["auto", "none"] = Field(
        "none",
        description="auto: a matrix that is several in one (q, k and v; gate and up) has an A and a B of "
        "adapter.rank for each of them",
    )
    init_from: str | None = init_from_field()
    low_rank_gradient: Literal["exact", "factorised", "corrected"] = Field(
        "exact",
        description="of A and B. exact: a third GEMM per layer; factorised: 2 rank / group of one, as if "
        "nothing were clipped; "
        "corrected: the same, and the clipped entries from the tokens of scale_grad_tokens",
    )

    _plan: dict[str, Parts] = PrivateAttr(default_factory=dict)  # of a model's layers, where segments: auto
    _parts: Parts = PrivateAttr(default=())

    @property
    def plan(self) -> dict[str, Parts]:
        """The parts of every layer that has some."""
        return self._plan

    @property
    def parts(self) -> Parts:
        """Of the layer that `of_layer` named; (): it is one."""
        return self._parts

    def with_plan(self, plan: Mapping[str, Parts]) -> Self:
        """With the parts of these layers (segments: auto)."""
        made = self.model_copy(update={"segments": "auto"})
        made._plan = {name: parts for name, parts in plan.items() if parts and self.trains(name)}
        return made

    def of_layer(self, layer_name: str) -> Self:
        made = self.model_copy(update=self.at(layer_name))
        made._parts = self._plan.get(layer_name, ())
        return made

    @model_validator(mode="after")
    def _one_gradient_of_parts(self) -> Self:
        if self.segments == "auto" and self.low_rank_gradient != "exact":
            raise ValueError(
                f"segments auto with low_rank_gradient {self.low_rank_gradient}, whose cost grows with the "
                "ranks of all parts; set low_rank_gradient: exact, or segments: none"
            )
        return self

    @model_validator(mode="after")
    def _cheaper_gradients(self) -> "LowRankOptions":
        if self.low_rank_gradient == "exact" and self.scale_grad_tokens < 1:
            raise ValueError(
                f"scale_grad_tokens {self.scale_grad_tokens:g} with low_rank_gradient exact, whose third "
                "GEMM is of all tokens and gives the scales' gradient too; set low_rank_gradient: factorised "
                "(or corrected), or scale_grad_tokens: 1"
            )
        return self

    def gradient_options(self) -> dict[str, Any]:
        return {**super().gradient_options(), "low_rank_gradient": self.low_rank_gradient}

    def gradient_cost(self, grid: IntGrid) -> float:
        """What the gradients of A, B and the scales cost, in GEMMs of the layer, beside the two of forward
        and input: 1 where exact.
        """
        if self.low_rank_gradient == "exact":
            return 1.0
        row_wise = grid.group_size == -1
        groups = 0.0 if self.live_grid or row_wise else 2 * self.rank / grid.group_size
        drawn = self.low_rank_gradient == "corrected" or (
            self.train_scale and (self.live_grid or not row_wise)
        )
        return groups + (self.scale_grad_tokens if drawn else 0.0)

    @property
    def gain(self) -> float:
        return self.alpha / self.rank

    @property
    def wants_weight(self) -> bool:
        return self.init == "loftq"

    def reject(self, grid: Grid) -> str | None:
        if reason := super().reject(grid):
            return reason
        assert isinstance(grid, IntGrid)
        if self.init == "loftq" and grid.residual_bits:
            return (
                "adapter.init: loftq approximates the rounding error, which the residual already holds: "
                "set quant.residual_bits: 0, or adapter.init: svd"
            )
        if self.init == "svd" and not grid.residual_bits:
            return (
                "adapter.init: svd reads the rounding error from the residual: set quant.residual_bits: "
                "4, or adapter.init: loftq"
            )
        return None


class Adapter(WeightAdapter):
    """Trainable tensors of one layer, and the config that built it. `forward` and `merge` see the same
    arguments.
    """

    rounding_loss: float | None = None  # size of the error of a merge that rounds again, over the update's
    kept: StepCodes | None = None  # train.keep_codes: the codes of this optimizer step

    def __init__(self, config: Any):
        super().__init__()
        self.config = config  # of the subclass's own type

    def grid_args(self, base: PackedWeight) -> GridArgs:
        raise AssertionError(f"{type(self).__name__} does not train integers")

    def plane_args(self, base: BinaryWeight) -> PlaneArgs:
        raise AssertionError(f"{type(self).__name__} does not train sign planes")

    def forward(self, x: Tensor, base: Weight) -> Tensor:
        """x [..., K] -> [..., N]."""
        if isinstance(base, BinaryWeight):
            return base.linear(x, self.plane_args(base))
        args = self.grid_args(base)
        return base.linear(x, args, self.step_codes(base, args))

    def step_codes(self, base: PackedWeight, args: GridArgs) -> Tensor | None:
        """The codes of this forward if they are there already; None: the op makes them."""
        if not args.moves:
            return base.codes if args.codes is None else args.codes
        if self.kept is None or not self.training or not torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling():  # versions cannot be looked at from inside
            return self.kept.codes if self.kept.checked_outside else None
        return self.kept.get(base, args, [*self.parameters(), *self.buffers()])

    def refresh_codes(self, base: Weight) -> None:
        """Make the codes of this step now, if they are to be kept and do not hold any more: for a forward
        that is compiled.
        """
        if (
            self.kept is not None
            and self.training
            and torch.is_grad_enabled()
            and isinstance(base, PackedWeight)
        ):
            with torch.no_grad():
                args = self.grid_args(base)
            if args.moves:
                self.kept.get(base, args, [*self.parameters(), *self.buffers()])

    @torch.no_grad()
    def merge(self, base: Weight) -> Weight:
        """The codes and scales of the forward, as a weight without residual."""
        if isinstance(base, BinaryWeight):
            return base.merged(self.plane_args(base))
        return base.merged(self.grid_args(base))

    def sum_of(self, adapters: "Sequence[Adapter]", weights: Sequence[float]) -> dict[str, Tensor] | None:
        """Trained tensors, by name, of the weight W0 + sum_i w_i (W^_i - W0); None: it has none."""
        return None

    def one_step(self, base: Weight) -> dict[str, Tensor | float]:
        """By name, of every tensor that trains: the standard deviation of independent changes of its numbers
        that move the layer's weights by one grid step, root mean square (latent.py)."""
        found: dict[str, Tensor | float] = dict.fromkeys(
            self.config.scale_parameters, latent.step_of_scale(base.grid)
        )
        found["offset"] = found["delta"] = 1.0  # counted in grid steps
        if isinstance(base, PackedWeight):
            args = self.grid_args(base)
            if args.a is not None and args.b is not None:
                found |= latent.steps_of_product(args.a, args.b, args.gain, latent.unit_of(args, base))
        if (learned := self._modules.get("input")) is not None:
            found |= {f"input.{n}": float(learned.one_step) for n, _ in learned.named_parameters()}  # pyright: ignore[reportArgumentType]
        return {name: found[name] for name, p in self.named_parameters() if p.requires_grad}

    def pull(self, base: PackedWeight, skip_clipped: bool) -> dict[str, Tensor]:
        """The gradient of |v - code|^2 / 2, by name of its code_parameters (latent.py)."""
        return latent.pull(base, self.grid_args(base), skip_clipped)

    def drawn(self, base: PackedWeight, share: float, skip_clipped: bool) -> dict[str, Tensor]:
        """By name, what to add that every value comes nearer to its code by that share of its distance, as
        far as these tensors can do it (latent.py)."""
        return latent.drawn(base, self.grid_args(base), share, skip_clipped)

    def begin_step(self, step: int, base: Weight) -> list[Carried]:
        """Called before optimizer step `step` (0-based); only methods with a schedule do something. What it
        keeps besides tensors is a function of `step` alone; it may write tensors, and says which rows of what
        an optimizer trains it has put elsewhere. So a resume calls it with the last step done and then reads
        the tensors."""
        return []

    def settle(self) -> None:
        """Make what this process has seen what all have seen, if it is anything that a checkpoint holds.
        Called by all of them, and as often as they like."""

    def resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Tensors of these shapes are about to be read into this adapter: its buffers that grow while it
        trains take them. Others are left to whoever compares.
        """

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Why these tensors of a file, by name, cannot be this adapter's, where names and shapes do not tell;
        None: they can.
        """
        return None

    def say_uncounted(self, what: str) -> None:
        """Warn, once, that nobody has called begin_step."""
        say_uncounted(self.config.method, what)


class ScaledAdapter(Adapter):
    """Owns `log_scale` [G, N]: S = s0 * exp(log_scale), rounded to the shipping dtype in the forward.

    The papers train S itself. A relative master makes one learning rate fit every layer (Adam's step is then
    a share of the scale) and keeps the sign of S; measured against an absolute master in LOG.md.
    """

    def __init__(self, config: ScaleOptions, base: Weight):
        super().__init__(config)
        self.factor = config.scale_gradient_factor(base)
        self.log_scale = nn.Parameter(
            torch.zeros(base.scale.shape, dtype=torch.float32, device=base.scale.device),
            requires_grad=config.train_scale,
        )

    def scale(self, base: Weight) -> Tensor:
        log_scale = self.log_scale if self.factor == 1.0 else scale_gradient(self.log_scale, self.factor)
        return cast_scale(base.scale.float() * exact_exp(log_scale), base.grid.scale_dtype)
