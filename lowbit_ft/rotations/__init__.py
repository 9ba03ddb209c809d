"""quant.rotation and quant.smooth: the model in another basis, in which less of it is lost by rounding.

Acts before packing, while the checkpoint is read (checkpoint.py): what leaves it is the folded model, whose
logits are the original's, and whoever packs, walks, trains, merges or exports sees nothing else. It may touch
dense values of the checkpoint and the slot `input_transform` of a PackedLinear, nothing else.

    ROTATIONS      the table: a choice of quant.rotation.kind is a file here
    families.py    where stream, heads and MLP are, by architecture; what is not written there is refused
    sites.py       the same in one model: the fold of every parameter
    modulation.py modulated.py   the same of diffusion transformers, whose norms are modulated by the time
    folds.py turn.py    the arithmetic
    plan.py        Rotation: the choice, as rotation.json keeps it
"""

from .adaptive import adaptive
from .base import Asked, Chosen, Kind, nowhere
from .checkpoint import FoldedCheckpoint
from .families import FAMILIES
from .hadamard import everywhere
from .modulated import ModulatedStructure, Scaled, structure_of
from .modulation import MODULATED, modulated
from .none import none
from .plan import FILE, SITES, Rotation, RotationFile, Site, SiteErrors
from .sites import Structure, family_problems
from .turn import OnlineHadamard, Turn

ROTATIONS: dict[str, Kind] = {
    "none": Kind(none, turns=False),
    "hadamard": Kind(everywhere),
    "adaptive": Kind(adaptive, needs_rows=True),
}

__all__ = [
    "FAMILIES",
    "FILE",
    "MODULATED",
    "ROTATIONS",
    "SITES",
    "Asked",
    "Chosen",
    "FoldedCheckpoint",
    "Kind",
    "ModulatedStructure",
    "OnlineHadamard",
    "Rotation",
    "Scaled",
    "RotationFile",
    "Site",
    "SiteErrors",
    "Structure",
    "Turn",
    "family_problems",
    "modulated",
    "nowhere",
    "structure_of",
]
