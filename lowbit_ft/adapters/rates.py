"""The learning rates that `train.learning_rate: auto` takes, by method and bits.

A place to begin, from a search on one small model (LOG.md, benchmarks/defaults.py). lr_qat: the best of four
rates at 2, 3 and 4 bits on text that the model knows; a new task in 40 steps wanted 8e-3 at every width, by
0.08 in loss at 2 and 3 bits and 0.24 at 4, where that rate undoes part of the start on known text. dl_qat and
l4q: the best of an earlier sweep on such text alone. full_qat and ef_qat (a tenth of the rows): the best of
two or three rates that double, 60 short steps, one seed (LOG.md).

A rate is of AdamW with the recipe's other defaults (rank 16; alpha 32 for lr_qat, whose D counts grid
steps, 16 elsewhere; cosine). Fewer bits, larger steps: there is more to win back.
Scales, magnitudes and offsets learn at the rate of A and B.
"""

RATES: dict[str, dict[int, float]] = {
    "lr_qat": {2: 4e-3, 3: 4e-3, 4: 2e-3},
    "dl_qat": {2: 2e-3, 3: 1e-3},
    "l4q": {2: 2e-3, 3: 1e-3},
    "lota": {2: 0.05, 3: 0.05, 4: 0.05},
    "full_qat": {2: 4e-3, 3: 2e-3, 4: 2e-3},
    "ef_qat": {2: 8e-3, 3: 4e-3, 4: 4e-3},
}
OTHERS = 1e-3  # methods and widths that were not tried


def rate_for(method: str, bits: int) -> tuple[float, str]:
    """The rate, and where it is from, for the line that says so."""
    if bits in RATES.get(method, {}):
        return RATES[method][bits], f"tried for {method} at {bits} bits on one small model"
    return OTHERS, f"the general one; none was searched for {method} at {bits} bits"
