"""Answers that are spans of a text, and how they are judged: SQuAD's exact match and F1.

    normal form   lower case, without punctuation, without the words a, an, the, one space between words
    exact match   the normal forms are equal
    F1            of the words of the normal forms, as bags; where one of them is empty, whether both are

A row is judged by the best of its right answers, and the measures are means over rows (arXiv 1606.05250,
section 6.1; of rows without an answer, whose right answer is the empty one, arXiv 1806.03822). SQuAD's own
script gives them times 100.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(said: str, right: str) -> float:
    return float(normal(said) == normal(right))


def f1(said: str, right: str) -> float:
    a, b = normal(said).split(), normal(right).split()
    if not a or not b:
        return float(a == b)
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b))


def of_spans(true: Sequence[Sequence[str]], said: Sequence[str]) -> dict[str, float]:
    """Per row the right answers (none: it has no answer) and what was said ("": that it has none). Where rows
    without an answer are among them, also the F1 of those with one, and the share of those without that was
    said to be so."""
    pairs = [
        ([one for one in right if normal(one)] or [""], own) for right, own in zip(true, said, strict=True)
    ]
    scores = [max(f1(own, one) for one in right) for right, own in pairs]
    found = {
        "exact_match": _mean([max(exact(own, one) for one in right) for right, own in pairs]),
        "f1": _mean(scores),
    }
    empty = [right == [""] for right, _ in pairs]
    if any(empty):
        found["f1_answerable"] = _mean([s for s, e in zip(scores, empty, strict=True) if not e])
        found["unanswerable"] = _mean([s for s, e in zip(scores, empty, strict=True) if e])
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def best_span(start: Tensor, end: Tensor, n_best: int, longest: int) -> tuple[float, int, int] | None:
    """(score, first token, last token): the pair of the highest sum of logits, of the `n_best` likeliest
    starts and ends, that is in order and no longer than `longest` tokens; None where there is no such pair.
    start, end: fp32 [L], -inf where no answer may be."""
    count = min(n_best, len(start))
    (s, first), (e, last) = start.topk(count), end.topk(count)
    length = last[None] - first[:, None] + 1
    scores = (s[:, None] + e[None]).masked_fill((length < 1) | (length > longest), float("-inf"))
    best = int(scores.argmax())
    score = float(scores.flatten()[best])
    return None if score == float("-inf") else (score, int(first[best // count]), int(last[best % count]))
