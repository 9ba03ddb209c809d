"""The first windows of a source, and a seeded choice of them: what is measured, what a calibrator sees."""

from __future__ import annotations

import itertools
import random
from typing import Any

from ..model.tokenizer import pad_id
from ..model.walk import Batch
from .batches import Batches
from .errors import DataError
from .examples import StreamedExamples
from .formats import FORMATS
from .mix import named, sources_of
from .windows import Examples


def first_windows(
    source: Any,
    section: Any,
    tokenizer: Any,
    rows: int | None,
    count: int | None,
) -> Examples:
    """The first `count` windows (None: all) of one source, or of several in turn, read only as far as needed;
    of pairs of answers the chosen ones, for one text is looked at. rows: of the model's embedding, None where
    that is not known."""
    alone = [
        one.model_copy(update={"format": FORMATS[one.format].alone or one.format})
        for one in sources_of(source)
    ]
    stream = StreamedExamples(alone, section, tokenizer, rows)
    return Examples(itertools.islice(iter(stream), count))


def calibration_windows(
    source: Any,
    section: Any,
    tokenizer: Any,
    *,
    rows: int | None,
    seed: int,
    samples: int,
    sequence_len: int,
    size: int,
) -> list[Batch]:
    """Batches of `size` windows of `sequence_len` tokens: a seeded choice of `samples` among the first
    4 x samples, so that a large or remote data set is not read whole."""
    changes = {"sequence_len": sequence_len, "train_on": "all", "streaming": True}
    pool = first_windows(source, section.model_copy(update=changes), tokenizer, rows, 4 * samples)
    picked = random.Random(seed).sample(range(len(pool)), min(samples, len(pool)))
    chosen = Examples(pool[i] for i in sorted(picked))
    if not len(chosen):
        raise DataError("no usable row to calibrate on", named(source))
    found = Batches(chosen, min(len(chosen), size), pad_id(tokenizer), 0, shuffle=False).one_epoch()
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in found]
