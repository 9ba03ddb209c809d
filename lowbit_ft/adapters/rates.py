"""The learning rates that `train.learning_rate: auto` takes, by method and bits.

A place to begin, from the first rows of a search on one small model (LOG.md; benchmarks/defaults.py is the
whole search). lr_qat at 3 bits: the best of three on text that the model knows, at 2 near it (a new task in
few steps wanted more); at 4 the quickstart's, beside which nothing was tried on such text. dl_qat and l4q:
the best of an earlier sweep on such text alone.

A rate is of AdamW with the recipe's other defaults (rank 16; alpha 32 for lr_qat, whose D counts grid
steps, 16 elsewhere; cosine). Fewer bits, larger steps: there is more to win back.
Scales, magnitudes and offsets learn at the rate of A and B.
"""

RATES: dict[str, dict[int, float]] = {
    "lr_qat": {2: 4e-3, 3: 4e-3, 4: 2e-3},
    "dl_qat": {2: 2e-3, 3: 1e-3},
    "l4q": {2: 2e-3, 3: 1e-3},
}
OTHERS = 1e-3  # methods and widths that were not tried


def rate_for(method: str, bits: int) -> tuple[float, str]:
    """The rate, and where it is from, for the line that says so."""
    if bits in RATES.get(method, {}):
        return RATES[method][bits], f"tried for {method} at {bits} bits on one small model"
    return OTHERS, f"the general one; none was searched for {method} at {bits} bits"
