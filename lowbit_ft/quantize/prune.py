"""prune: the zeros of a matrix that is about to be packed (sparsity/), and the weights that its calibrator is
given.

One that makes up for zeros while it rounds (gptq) is given the matrix as it came and the zeros; any other the
weights that are left, which a sparsity may have moved (sparsegpt). Either way every zero is one of the
calibrator's result, and from then on its mask's.
"""

from dataclasses import replace

from torch import Tensor

from ..grid import PackedWeight, Weight
from ..grid.calibrate import Calibrator, Curvature, Stats
from ..recipe.sections.quant import QuantSection
from ..sparsity import PATTERNS, SPARSITY, Asked, Sparsity

WITHOUT_TEXT = "magnitude"  # in the place of what looks at text, where none came by


def sparsity_of(quant: QuantSection, curvature: Curvature | None) -> Sparsity:
    """What chooses the zeros of a matrix with that curvature of its inputs."""
    kind = quant.sparsity.at_once
    return SPARSITY[WITHOUT_TEXT] if kind.needs_text and curvature is None else kind


def start(weight: Tensor, quant: QuantSection, run: Calibrator, stats: Stats) -> tuple[Tensor, Tensor, Stats]:
    """(zeros bool [N, K], the weights that `run` is given, its stats) of a matrix [N, K]. ValueError where it
    cannot have such zeros."""
    pattern = PATTERNS[quant.sparsity.pattern]
    kind = sparsity_of(quant, stats.curvature)
    if kind.prunes and (reason := pattern.reject_width(weight.shape[1])):
        raise ValueError(f"quant.sparsity.pattern: {pattern.name}: {reason}")
    asked = Asked(quant.sparsity.share, pattern, stats.curvature, stats.damping, stats.act_order)
    if run.makes_up:
        zeros = kind.zeros(weight, asked)
        return zeros, weight, replace(stats, zeros=zeros)
    zeros, left = kind.start(weight, asked)
    return zeros, left, stats


def locked(base: Weight, zeros: Tensor) -> Weight:
    """The packed matrix with these zeros locked. A calibrator that left one of them is our own mistake."""
    assert isinstance(base, PackedWeight)
    return base.masked(zeros)


def adopted(base: PackedWeight) -> PackedWeight:
    """The codes of a checkpoint that came quantized, those at the zero point locked."""
    return base.masked(base.dequantize() == 0)
