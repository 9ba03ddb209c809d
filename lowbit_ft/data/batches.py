"""From windows to batches: order, padding, and keeping segments apart.

The order is one endless list of windows, a seeded permutation per epoch, cut into micro-batches; rank r of W
takes micro-batch r, r + W, ... So W processes with gradient accumulation a see, step for step, what one
process with W * a sees, and a position is one pair (epoch, windows consumed by all ranks) that says where to
go on, bit for bit. An epoch that does not divide runs over into the next: no window is left out and no batch
is short.

Segments. Most models attend segment by segment, without any mask (model/attention.py). Of the others,
transformers builds a block-diagonal causal mask when it gets position_ids that restart, no attention_mask and
use_cache=False; for flex attention in blocks, for eager and sdpa as [B, 1, L, L]. A few do not even that.
`keeps_segments_apart` asks the model itself; where it says no, Batches(..., mask_dtype=model.dtype) adds an
explicit [B, 1, L, L] mask, which sdpa and eager take as it is.

Padding is on the right, where causal attention never looks from a real token. It needs no mask: pad positions
go on counting in the row's last segment and their labels are -100.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.attention import block_diagonal_mask, segment_inputs
from .errors import DataError
from .windows import Example, Examples

SHUFFLE_BUFFER = 256  # windows of a stream held to choose the next from; 256 x 2048 tokens are about 20 MB


def collate(
    examples: Sequence[Example],
    pad_id: int,
    *,
    mask_dtype: torch.dtype | None = None,
    taught: bool = False,
    numbers: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Windows -> input_ids, labels, position_ids, int64 [B, L], L the longest window; with mask_dtype also
    attention_mask [B, 1, L, L] of that dtype, as block_diagonal_mask makes it; taught: also what is no
    model's business but a teacher's: `used`, int64 [B], the tokens of each row before its padding, and with
    numbers `windows`, int64 [B], which windows of the data these are."""
    length = max(len(e.input_ids) for e in examples)
    ids = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    positions = torch.empty_like(ids)
    for b, example in enumerate(examples):
        size = len(example.input_ids)
        assert sum(example.segments) == size == len(example.labels), "segments do not cover the window"
        ids[b, :size] = torch.tensor(example.input_ids)
        labels[b, :size] = torch.tensor(example.labels)
        sizes = [*example.segments[:-1], example.segments[-1] + length - size]
        positions[b] = torch.cat([torch.arange(n) for n in sizes])
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    if mask_dtype is not None:
        batch["attention_mask"] = block_diagonal_mask(positions, mask_dtype)
    if taught:
        batch["used"] = torch.tensor([len(e.input_ids) for e in examples])
        if numbers:
            batch["windows"] = torch.tensor(numbers, dtype=torch.int64)
    return batch


@torch.no_grad()
def keeps_segments_apart(model: Any, batch_size: int = 1) -> bool:
    """Whether `model` keeps packed segments apart from position_ids alone: changes a first segment of three
    tokens and looks whether the logits of a second one move. Runs two forwards of 6 tokens per row."""
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(6, device=device) % vocabulary).repeat(batch_size, 1)
    other = ids.clone()
    other[:, :3] = (ids[:, :3] + vocabulary // 2) % vocabulary
    positions = torch.tensor([0, 1, 2, 0, 1, 2]).repeat(batch_size, 1)
    told = {
        key: v.to(device) if isinstance(v, Tensor) else v
        for key, v in segment_inputs(model, positions).items()
    }
    positions = positions.to(device)
    training = model.training
    model.eval()
    try:
        a, b = (
            model(input_ids=x, position_ids=positions, use_cache=False, **told).logits[:, 3:]
            for x in (ids, other)
        )
    finally:
        model.train(training)
    # exact: a masked key weighs 0.0. What differs for another reason only costs an explicit mask.
    return bool(torch.equal(a, b))


class Batches:
    """An endless iterator of micro-batches (see collate) over Examples, in memory or streamed.

    rank, world: this process and how many there are.  mask_dtype: add an explicit mask of this dtype (file
    head). taught: add what a teacher has to know of a batch (`used`, and but for a stream `windows`).
    state_dict() after n batches, loaded into a Batches over the same data, continues with batch n + 1, bit
    for bit; take it when all ranks have had the same number of batches, as at the end of a step. A stream is
    resumed by reading it again up to there."""

    def __init__(
        self,
        examples: Examples,
        micro_batch_size: int,
        pad_id: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        *,
        mask_dtype: torch.dtype | None = None,
        taught: bool = False,
    ):
        if micro_batch_size < 1:
            raise DataError(f"micro_batch_size {micro_batch_size}; at least 1")
        assert 0 <= rank < world, f"rank {rank} of {world}"
        if not examples.streaming and not len(examples):
            raise DataError("no examples to make batches of")
        self.examples, self.micro_batch_size, self.pad_id = examples, micro_batch_size, pad_id
        self.seed, self.rank, self.world, self.shuffle = seed, rank, world, shuffle
        self.mask_dtype, self.taught = mask_dtype, taught
        self._go_to(0, 0)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, Tensor]:
        size = self.micro_batch_size
        # every rank walks over the windows of all, and builds its own only
        walked = [self._advance() for _ in range(size * self.world)]
        mine = walked[self.rank * size : (self.rank + 1) * size]
        return self._collate(
            [self.examples[w] if isinstance(w, int) else w for w in mine],
            [w for w in mine if isinstance(w, int)],
        )

    def _collate(self, windows: Sequence[Example], numbers: Sequence[int]) -> dict[str, Tensor]:
        return collate(windows, self.pad_id, mask_dtype=self.mask_dtype, taught=self.taught, numbers=numbers)

    def __len__(self) -> int:
        """Micro-batches per epoch and rank, the last one counted whole. DataError for a stream."""
        return -(-len(self.examples) // (self.micro_batch_size * self.world))

    def one_epoch(self) -> Iterator[dict[str, Tensor]]:
        """Every window once, unshuffled, this rank's micro-batches only, the last one possibly short.

        For evaluation: a rank may have one batch less than another, and the position stays as it is.
        """
        held: list[Example] = []
        index = first = 0
        for example in self.examples:
            held.append(example)
            if len(held) == self.micro_batch_size:
                if index % self.world == self.rank:
                    yield self._collate(held, range(first, first + len(held)))
                held, index, first = [], index + 1, first + len(held)
        if held and index % self.world == self.rank:
            yield self._collate(held, range(first, first + len(held)))

    def first(self, count: int) -> list[int]:
        """The numbers, ascending, of the windows that all ranks together see first when they see `count`.
        DataError for a stream."""
        order = Batches(self.examples, 1, self.pad_id, self.seed, shuffle=self.shuffle)
        found: set[int] = set()
        for _ in range(count):
            if len(found) == len(self.examples):
                break  # the next epochs bring the same
            number = order._advance()
            assert isinstance(number, int), "a stream has no length"
            found.add(number)
        return sorted(found)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: epoch, position (windows of the epoch consumed by all ranks), and what they mean a
        position in."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the saved position. Raises DataError if it is one in other data or another order."""
        for key, now in self._identity().items():
            if state.get(key) != now:
                raise DataError(
                    f"cannot resume: {key} was {state.get(key)!r} and is {now!r}; resume with the data, "
                    "sequence_len, seed and shuffle of the run, or start a new one"
                )
        self._go_to(int(state["epoch"]), int(state["position"]))

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "shuffle": self.shuffle, "digest": self.examples.digest}

    def _go_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._order: list[int] | None = None
        self._stream: Iterator[Example] | None = None

    def _advance(self) -> int | Example:
        """The next window of the endless order: its index, or for a stream the window itself."""
        if self.examples.streaming:
            return self._advance_stream()
        if self.position >= len(self.examples):
            self._go_to(self.epoch + 1, 0)
        if self._order is None:
            self._order = list(range(len(self.examples)))
            if self.shuffle:
                self._random().shuffle(self._order)
        self.position += 1
        return self._order[self.position - 1]

    def _advance_stream(self) -> Example:
        if self._stream is None:
            self._stream = self._epoch_stream()
            for _ in range(self.position):
                if next(self._stream, None) is None:
                    raise DataError(f"cannot resume: the stream ended before window {self.position}")
        window = next(self._stream, None)
        if window is None:
            if not self.position:
                raise DataError("the stream gave no window")
            self._go_to(self.epoch + 1, 0)
            return self._advance_stream()
        self.position += 1
        return window

    def _epoch_stream(self) -> Iterator[Example]:
        if not self.shuffle:
            return iter(self.examples)
        return _shuffled(iter(self.examples), self._random())

    def _random(self) -> random.Random:
        # seeded by a string: hashed with sha512, the same in every process and on every machine
        return random.Random(f"{self.seed}/{self.epoch}")


def _shuffled(windows: Iterator[Example], rng: random.Random) -> Iterator[Example]:
    """Each window drawn is replaced by the next of the stream; the rest is drawn when the stream has
    ended."""
    held: list[Example] = []
    for window in windows:
        if len(held) < SHUFFLE_BUFFER:
            held.append(window)
            continue
        i = rng.randrange(SHUFFLE_BUFFER)
        yield held[i]
        held[i] = window
    rng.shuffle(held)
    yield from held
