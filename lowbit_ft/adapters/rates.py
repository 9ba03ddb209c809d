"""The learning rates that `train.learning_rate: auto` takes, by method and bits.

A place to begin, from a search on one small model (LOG.md, benchmarks/defaults.py). lr_qat: the best of four
rates at 2, 3 and 4 bits on text that the model knows; a new task in 40 steps wanted 8e-3 at every width, by
0.08 in loss at 2 and 3 bits and 0.24 at 4, where that rate undoes part of the start on known text. dl_qat and
l4q: the best of four on such text alone (at 4 bits half of it is better there by 0.002 to 0.004, and worse by
0.15 on a new task). full_qat and ef_qat (a tenth of the rows): the best of
two or three rates that double, 60 short steps, one seed (LOG.md). lota: the paper's, at every width; no other
was tried here (it is the share of entries that t-SignSGD steps).

Of the others, a rate is of AdamW with the recipe's other defaults (rank 16; alpha 32 for lr_qat, whose D
counts grid steps, 16 elsewhere; cosine). Fewer bits, larger steps: there is more to win back.
At 6 bits nothing was searched: midway between the method's rate at 4 bits and the general one, which 8 has.
Scales, magnitudes and offsets learn at the rate of A and B.
"""

RATES: dict[str, dict[int, float]] = {
    "lr_qat": {2: 4e-3, 3: 4e-3, 4: 2e-3},
    "dl_qat": {2: 2e-3, 3: 1e-3, 4: 1e-3},
    "l4q": {2: 2e-3, 3: 1e-3, 4: 1e-3},
    "full_qat": {2: 4e-3, 3: 2e-3, 4: 2e-3},
    "ef_qat": {2: 8e-3, 3: 4e-3, 4: 4e-3},
}
PAPERS: dict[str, float] = {"lota": 0.05}  # arXiv 2505.18724
BETWEEN = {6: 4}  # widths that were not tried: the width below, whose rate and OTHERS' theirs is between
OTHERS = 1e-3  # methods and widths that were not tried


def rate_for(method: str, bits: int) -> tuple[float, str]:
    """The rate, and where it is from, for the line that says so."""
    if method in PAPERS:
        return PAPERS[method], f"the paper's for {method}; none was searched here"
    if bits in BETWEEN and BETWEEN[bits] in RATES.get(method, {}):
        near = BETWEEN[bits]
        rate = (RATES[method][near] + OTHERS) / 2
        return (
            rate,
            f"midway between {method}'s at {near} bits and the general one; none was searched at {bits}",
        )
    if bits in RATES.get(method, {}):
        return RATES[method][bits], f"tried for {method} at {bits} bits on one small model"
    return OTHERS, f"the general one; none was searched for {method} at {bits} bits"
