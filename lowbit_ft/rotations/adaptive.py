"""kind: adaptive. r1 always; each other site in those layers where it lowers the error (RoSTE, arXiv
2502.09003, section 4).

    on  iff  e_w(on) + e_x(on) < e_w(off) + e_x(off)        e = ||Q(v) - v||^2 / ||v||^2

Relative errors, because a weight's absolute one is orders below its activation's and would not count;
compared as numbers; ties are off. To rotate everything can be far worse than nothing (their Pythia 1B: 13.1
against 22.4 ROUGE), so each layer decides for itself.
"""

from .base import Asked, Chosen, nowhere


def adaptive(asked: Asked) -> tuple[bool, Chosen]:
    chosen: Chosen = nowhere(asked)
    for row in asked.errors:
        on, layers = asked.sites[row.site] and row.on, chosen[row.site]
        chosen[row.site] = (*layers[: row.layer], on, *layers[row.layer + 1 :])
    return asked.r1, chosen
