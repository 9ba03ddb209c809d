"""signals: what the loss compares the model with, and who answers.

A step: the teacher (if the signal asks one) runs on the micro-batch without gradient; then the student's
forward, whose loss runs over chunks of positions: logits of a chunk, the teacher's answers for the same
positions, and the sums of the signal's parts (train/losses.py calls them, and again in the backward, where
the chunk is made anew). The loop divides each part's sum by the number of positions it counts in the global
batch.

A signal is a file with a class of `parts` and `sums`, and a line in SIGNALS. A teacher is a file with a class
that can say its `problems`, its `costs`, its `answers` and its `facts`, and a line in TEACHERS; any other
name in train.teacher is a folder or hub id (checkpoint.py). What is measured (validation, evaluate) stays
the cross entropy of the labels. A signal of layers (layers.py) has the teacher's layers run beside the
student's, one by one (lockstep.py), in whose forward they may intervene (intervention.py). A signal of pairs
(preferences: pairs.py) adds up whole answers, is measured by itself, and may refer to the base without
adapters (reference.py), which REFERENCES runs or has kept."""

from .base import Ask, Costs, Given, Lesson, Making, Part, Signal, Sparse, Teacher, Whole
from .cached import Cached
from .checkpoint import OtherModel
from .dpo import Dpo
from .labels import Labels
from .layers import Layers
from .logits import Logits
from .mix import Mix
from .orpo import Orpo
from .reference import REFERENCES
from .residual import Residual

SIGNALS: dict[str, Signal] = {
    "labels": Labels(),
    "logits": Logits(),
    "mix": Mix(),
    "layers": Layers(),
    "dpo": Dpo(),
    "orpo": Orpo(),
}
TEACHERS: dict[str, type[Teacher]] = {"residual": Residual, "cached": Cached}


def teacher_kind(name: str) -> type[Teacher]:
    """The class of train.teacher `name`: a member of TEACHERS, else that of a checkpoint."""
    return TEACHERS.get(name, OtherModel)


__all__ = [
    "REFERENCES",
    "SIGNALS",
    "TEACHERS",
    "Ask",
    "Costs",
    "Given",
    "Lesson",
    "Making",
    "OtherModel",
    "Part",
    "Signal",
    "Sparse",
    "Teacher",
    "Whole",
    "teacher_kind",
]
