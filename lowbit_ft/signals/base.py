"""What a signal and a teacher are.

A signal turns the logits of a chunk of positions into sums, one for each of its parts; the loop divides each
by the number of positions that the part counts in the whole global batch, and adds them up by their weights.
A signal of pairs (pairs.py) needs whole sequences, so of a chunk it keeps what is said of every position,
and makes its sums of all chunks together.
A teacher answers for the same positions: with whole logits, made chunk by chunk, with the k most likely
tokens and the mass of the rest, or with the log-probability of the token that comes next. It trains nothing,
wants no gradient, and does not change while the student trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..model.heads import Answering

if TYPE_CHECKING:
    from .lockstep import Lockstep

TAUGHT = ("used", "windows")  # of a batch, what is no model's business but a teacher's (see Ask)


@dataclass(frozen=True)
class Whole:
    """A teacher's logits [r, V] of r positions, before any temperature."""

    logits: Tensor


@dataclass(frozen=True)
class Sparse:
    """A teacher's most likely tokens of r positions: ids int64 [r, k], their log-probabilities [r, k], and
    the log of the mass of all others [r] (-inf when there are none). At the temperature of the signal; the k
    in any order."""

    ids: Tensor
    log_p: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Known:
    """A teacher's log-probabilities [r] of the tokens that come next at r positions."""

    log_p: Tensor


Given = Whole | Sparse | Known
# positions int64 [r] of the B x L of a batch, on the device -> what the teacher says there. Called in the
# forward of a chunk and again in its recomputation, so it must give the same both times.
Answers = Callable[[Tensor], Given]


@dataclass(frozen=True)
class Part:
    """A part of a loss: its weight in the sum, and what it is a mean over: the positions whose next token is
    a target, or all that have one within their segment; of pairs (a window's segments are a chosen and a
    rejected sequence in turn) the pairs, or all positions of the chosen ones. told: no part of the loss but a
    number for the log, with its own name there."""

    weight: float
    on: Literal["targets", "all", "pairs", "chosen"] = "targets"
    told: bool = False


class Signal:
    """A member of SIGNALS. options: the section train.signal, as everywhere below."""

    asks: ClassVar[bool] = True  # it needs train.teacher
    refers: ClassVar[bool] = False  # its teacher is the model itself without adapters (reference.py)
    language: ClassVar[bool] = True  # it needs what only language models have
    of_layers: ClassVar[bool] = (
        False  # it looks into the layers of a teacher that can be walked (lockstep.py)
    )
    pairs: ClassVar[bool] = False  # it learns from rows of two answers, and what is measured is itself
    keys: ClassVar[frozenset[str]] = frozenset()  # of the section, beside `kind`: those it reads

    def parts(self, options: Any) -> dict[str, Part]:
        """Name -> part, in the order of `sums`."""
        raise AssertionError(f"{type(self).__name__} has no parts")

    def sums(
        self, options: Any, logits: Tensor, tokens: Tensor, counted: Tensor, given: Given | None
    ) -> tuple[Tensor, ...]:
        """The sums of the parts over the positions of a chunk: scalars in fp32 (fp64 for fp64 logits),
        differentiable in logits.

        logits [r, V] of the student; tokens int64 [r] that come next, IGNORE where none is a target; counted
        bool [r]: whether a part that is not on targets counts the position; given: the teacher's answers.
        """
        raise AssertionError(f"{type(self).__name__} has no sums")

    def reads_maps(self, options: Any) -> bool:
        """Whether attention has to write out its scores (model/maps.py)."""
        return False

    @contextmanager
    def begin(self, lesson: Lesson, model: nn.Module, student: Answering) -> Iterator[None]:
        """Inside, the lesson is ready for the forwards of `model`, which is not yet compiled or wrapped."""
        with nullcontext() if lesson.teacher is None else lesson.teacher.begin(student):
            yield

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, L] on the CPU, not shifted: the tokens that positions are to predict, IGNORE where the loss
        does not look."""
        return batch["labels"]

    def joined(self, options: Any, chunks: Sequence[tuple[Tensor, ...]], looked: Looked) -> Tensor:
        """The sums of the parts [parts] of a micro-batch, of what `sums` gave for each of its chunks."""
        totals = [torch.stack(column) for column in zip(*chunks, strict=True)]
        return torch.stack([total.double().sum().to(total.dtype) for total in totals])


@dataclass(frozen=True)
class Looked:
    """The positions of a micro-batch that went through `Signal.sums`: where, ascending places in the B L of
    `batch`, known to the host."""

    where: Sequence[int]
    batch: dict[str, Tensor]


@dataclass(frozen=True)
class Ask:
    """A micro-batch, for a teacher: as it came from the data, on the CPU (input_ids, labels, position_ids,
    perhaps attention_mask; used [B]: tokens before the padding; windows int64 [B]: numbers of the windows in
    data order), and `inputs`, what the student's forward is called with, on its device. measured: it is of
    the validation data."""

    batch: dict[str, Tensor]
    inputs: dict[str, Any]
    device: torch.device
    measured: bool = False


@dataclass(frozen=True)
class Walked:
    """A teacher whose layers are run one by one (lockstep.py): its model, how that is asked, what it is
    called with for a micro-batch, and what a part of it is run in."""

    model: nn.Module
    answering: Answering
    inputs: Callable[[Ask], dict[str, Any]]
    at_work: Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Making:
    """What a teacher can be made of, in a run. model: the student, packed, adapters attached, before it is
    wrapped or sharded; pack(source) -> another checkpoint's model, packed to 8 bits, and facts that tell it
    from any other; kept() -> what the full-precision model says about the windows of this run, on the disk
    (store.Store), asked now where it was not; referred() -> the same of the packed base without adapters
    (sequences.SequenceStore), of the training windows and of those of validation, where there are some."""

    model: nn.Module
    pack: Callable[[str], tuple[Any, dict[str, Any]]]
    kept: Callable[[], Any]
    referred: Callable[[], tuple[Any, Any]]


@dataclass(frozen=True)
class Costs:
    """What a teacher costs, for plan: bytes held on the device while training; bytes on the disk, of the
    windows of one process; forwards per micro-batch, of a model of the student's size (its hidden states then
    wait for the loss); forwards before training, at most, for every micro-batch of it; whether these go
    through dense layers, one at a time; and a word."""

    held: int = 0
    disk: int = 0
    forwards: float = 0.0
    before: float = 0.0
    walks: bool = False
    note: str = ""
    asked: bool = True

    @property
    def live(self) -> bool:
        """Whether it runs beside the student."""
        return self.forwards > 0


class Teacher:
    """A member of TEACHERS, made for one run.

    facts: JSON-able, goes into the checkpoint's meta: a resume with another teacher is refused. nearest: how
    many times nearer to full precision than the student it must be at step 0, by KL, or it is refused with
    `instead`; None: it is not measured against it.
    """

    nearest: ClassVar[float | None] = None
    instead: ClassVar[str] = ""
    batches_need: ClassVar[frozenset[str]] = frozenset()  # keys of Ask.batch beside the usual ones

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    @classmethod
    def problems(cls, recipe: Any, name: str) -> list[str]:
        """Why this recipe cannot have it, each with the way out. Nothing is loaded. name: train.teacher."""
        return []

    @classmethod
    def costs(cls, recipe: Any, name: str, weights: int, beside: int, vocabulary: int) -> Costs:
        """weights: numbers in the matrices of the student's layers; beside: bytes of its embeddings, head and
        norms."""
        return Costs()

    @classmethod
    def make(cls, making: Making, name: str) -> Teacher:
        """ValueError where it cannot be made."""
        raise AssertionError(f"{cls.__name__} cannot be made")

    def model(self) -> tuple[nn.Module, AbstractContextManager[None]] | None:
        """The model to measure (KL to full precision) and what to do it in; None: it is full precision by
        what it is made of."""
        return None

    def begin(self, student: Answering) -> AbstractContextManager[None]:
        """Called when the student is ready to train, before it is compiled or wrapped; closed behind
        training."""
        return nullcontext()

    def walked(self) -> Walked | None:
        """Itself, to be run layer by layer, after `begin`; None: it keeps answers and no layers."""
        return None

    def answers(self, ask: Ask) -> Answers:
        """Called in the student's forward, inside its autocast, before it runs itself."""
        raise AssertionError(f"{type(self).__name__} has no answers")


@dataclass
class Lesson:
    """What a run learns from: a signal, its options, and the teacher where it asks one. lockstep: the walk
    through the layers of both, while a run is at work that learns from them."""

    signal: Signal
    options: Any
    teacher: Teacher | None = None
    parts: dict[str, Part] = field(init=False)
    lockstep: Lockstep | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        assert (self.signal.asks or self.signal.refers) == (self.teacher is not None), (
            "a signal that asks, and only such, has a teacher"
        )
        self.parts = self.signal.parts(self.options)

    @property
    def weights(self) -> list[float]:
        """Of the parts, in the order of their sums."""
        return [part.weight for part in self.parts.values()]

    def joined(self, parts: list[float]) -> float:
        """The loss that its parts, each a mean, make."""
        return sum(weight * part for weight, part in zip(self.weights, parts, strict=True))

    def at(self, step: int, total: int, seed: int) -> None:
        """Step `step` of `total` is about to be computed."""
        if self.lockstep is not None:
            self.lockstep.at(step, total, seed)

    def free_from(self, total: int) -> int:
        """The first step of a run in which no teacher intervenes."""
        return 0 if self.lockstep is None else self.lockstep.free_from(total)

    @property
    def idle(self) -> Sequence[nn.Parameter]:
        """What trains, and by an intervention learned nothing in the last forward."""
        return () if self.lockstep is None else self.lockstep.idle

    @property
    def taught(self) -> bool:
        """Whether its batches must say where the padding begins, and which windows they are."""
        return self.teacher is not None or self.signal.pairs

    def told(self, parts: list[float]) -> dict[str, float]:
        """The parts under the names they have in the log; where but one is learned, it is the loss."""
        alone = sum(not part.told for part in self.parts.values()) == 1
        return {
            name if part.told else f"{name}_loss": value
            for (name, part), value in zip(self.parts.items(), parts, strict=True)
            if part.told or not alone
        }
