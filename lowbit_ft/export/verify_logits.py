"""verify_logits: what the packed model says, what the reader's model says, and how far apart they may be."""

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.attach import packed_layers
from ..model.linear import packed_op_only
from ..model.purpose import answer_of
from .answers import Answers, answer
from .base import Exporter, Weights

# Only where the two sides do not make the same call. fp32 rounding over a few dozen layers stays below 1e-4
# of the largest logit, bf16 below 3e-2; a wrong code or scale in one layer gives more than that, and the
# exact comparison of weights has found it before.
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# The same where inputs are quantized, by their bits: a sum that rounds otherwise in its last bit may move the
# input of the next layer over a tie, and then by a whole step. Measured on the tiny Llama: from 1e-6 to 5e-4
# at 8 bits, to a third of the largest logit at 4. Nudged (below) 32 times on random tokens, at most: 0.02 at
# 8 bits, 0.07 at 6, 0.5 at 4, 0.3 at 3.
INPUT_TOLERANCE = {8: 5e-2, 6: 0.2, 4: 0.5, 3: 0.7}
# Some models fall further: two bits, 8-bit inputs and sharp answers (a MiniLM for questions: 9 % of the
# largest). How far, the packed model says itself, where what enters its first layer is off by so much.
NUDGES = [sign * size * 2.0**-21 for size in (1, 2, 3, 4) for sign in (1, -1)]


@dataclass(frozen=True)
class Expected:
    """What the packed model says: logits, its greedy answers, and the kind of device that computed them.
    moves: by how much NUDGES move the logits."""

    logits: Tensor
    answers: list[Any]
    device: str
    moves: float


def compare_logits(
    expected: Expected,
    loaded: nn.Module,
    logits: Tensor,
    exporter: Exporter,
    weights: Weights,
    kind: torch.dtype,
    same_call: bool,
) -> tuple[float, float, Answers | None]:
    """(largest difference of logits, what is allowed, the answers). same_call: the reader makes the very call
    of the packed model."""
    rounding = rounding_of(kind, weights)
    # A reader with an arithmetic of its own rounds to 16 bits at other places than we do.
    tolerance = exporter.tolerance and max(exporter.tolerance, 2 * LOGIT_TOLERANCE[kind], rounding)
    largest = float(expected.logits.abs().max())
    answers = None
    if expected.answers:
        answers = Answers.compare(
            lambda x: logits_of(loaded, {"input_ids": x}), expected.answers, tolerance or rounding
        )
    bound = max(tolerance * largest, 2 * expected.moves)
    if bound == 0 and not same_call:
        bound = rounding * largest
    return float((logits - expected.logits).abs().max()), bound, answers


def expected_of(
    model: nn.Module | Callable[[], nn.Module],
    exporter: Exporter,
    folder: Path,
    prompts: list[Tensor],
    given: Mapping[str, Tensor],
) -> Expected:
    """Ask the packed model; one that was loaded here is gone again afterwards."""
    packed: Any = model if isinstance(model, nn.Module) else model()
    if exporter.computes_in is not None and packed.dtype != exporter.computes_in:
        packed = copy.deepcopy(packed).to(exporter.computes_in)
    logits = logits_of(packed, given)
    stops = exporter.stops(folder)  # of a gguf file a reading of all its tokens
    answers = [answer(lambda x: logits_of(packed, {"input_ids": x}), prompt, stops) for prompt in prompts]
    steps = any(layer.activation is not None for _, layer in packed_layers(packed))  # which sums fall over
    moves = max(moves_of(packed, given, logits, by) for by in NUDGES) if exporter.tolerance and steps else 0.0
    return Expected(logits, answers, next(packed.parameters()).device.type, moves)


@torch.no_grad()
def moves_of(packed: Any, given: Mapping[str, Tensor], logits: Tensor, by: float) -> float:
    given = {n: x * (1 + by) if x.is_floating_point() else x for n, x in given.items()}
    with ExitStack() as stack:
        if "input_ids" in given:
            hook = packed.get_input_embeddings().register_forward_hook(lambda m, a, out: out * (1 + by))
            stack.callback(hook.remove)
        return float((logits_of(packed, given) - logits).abs().max())


def rounding_of(kind: torch.dtype, weights: Weights) -> float:
    """By which share of the largest logit two sides may differ that add in another order."""
    bits = {spec.activation.bits for spec in weights.specs.values() if spec.activation is not None}
    return max([LOGIT_TOLERANCE[kind], *(INPUT_TOLERANCE[b] for b in bits)])


def logits_of(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """A model that answers with something else than logits says by `probe` what it is asked with these."""
    training = model.training
    model.eval()
    try:
        with packed_op_only(model):
            device = next(model.parameters()).device
            moved = {name: value.to(device) for name, value in given.items()}
            probe = getattr(model, "probe", None)
            return (answer_of(model(**moved)) if probe is None else probe(**moved)).float().cpu()
    finally:
        model.train(training)
