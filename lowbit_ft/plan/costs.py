"""What a step is asked for and what it answers: its setting, and the bytes of its stretches."""

from dataclasses import dataclass

from ..recipe.recipe import Recipe
from ..signals import SIGNALS


def attends(recipe: Recipe) -> str:
    """How the model attends while it trains: a signal that reads its scores has them written out."""
    signal = recipe.train.signal
    return "eager" if SIGNALS[signal.kind].reads_maps(signal) else recipe.model.attention


def by_states(recipe: Recipe) -> bool:
    """Whether the hidden states of a model and its teacher are compared whole (tasks/states.py)."""
    return recipe.task.states and SIGNALS[recipe.train.signal.kind].of_layers


@dataclass(frozen=True)
class Setting:
    """What a step's memory depends on beside the model. arch: of the GPU (10 x capability), 0: a CPU.
    states: its hidden states are compared whole (tasks/states.py)."""

    windows: int
    length: int
    dtype: str
    mixed: str
    checkpointing: bool
    accumulate: bool
    masked: bool
    attention: str
    arch: int
    mlp_chunk: int | None = None
    states: bool = False


@dataclass(frozen=True)
class Cost:
    """Bytes of a stretch of the step. forward: peak, its input included; kept: from forward to backward;
    backward: peak, with what was kept and the incoming gradient; gradients: what it leaves in .grad;
    evaluation: peak of the forward where no gradient is wanted; forward_ops and backward_ops: the part of the
    two peaks that is inside packed ops."""

    forward: int
    kept: int
    backward: int
    gradients: int
    evaluation: int
    forward_ops: int = 0
    backward_ops: int = 0


@dataclass(frozen=True)
class Step:
    """context, the input of a layer, the costs by layer and of the tail (norm, head, loss); frame: what the
    model's own forward holds beside the context while its layers run (embeddings that a variable keeps);
    states: numbers in the hidden states of a batch, where it is asked for them."""

    context: int
    hidden: int
    frame: int
    layers: tuple[Cost, ...]
    tail: Cost
    notes: tuple[str, ...] = ()
    states: int = 0
