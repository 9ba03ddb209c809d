"""What is measured beside the loss, by scikit-learn and SciPy (`pip install 'lowbit-ft[tasks]'`).

accuracy    answers that are right                      f1        of the second label where there are two,
matthews    Matthews' correlation coefficient                     else the mean over the labels (macro)
pearson     and spearman: correlations of numbers       micro_f1  over all labels together
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

NEEDS = ("sklearn", "scipy")
ZERO: Any = 0.0  # of an F1 that is 0 / 0 (scikit-learn annotates text alone)


def missing() -> str | None:
    """Why nothing can be measured here, with the way out; None when it can."""
    absent = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    return (
        f"scores are scikit-learn's, which is not installed ({', '.join(absent)}); pip install "
        "'lowbit-ft[tasks]'"
        if absent
        else None
    )


def of_classes(true: Sequence[int], said: Sequence[int], labels: int) -> dict[str, float]:
    """One label per row, numbers of them."""
    from sklearn import metrics  # heavy: only measuring needs it

    average, numbers = ("binary", [0, 1]) if labels == 2 else ("macro", list(range(labels)))
    with warnings.catch_warnings():  # a label that no row has: its F1 is 0, as zero_division says
        warnings.simplefilter("ignore")
        f1 = metrics.f1_score(true, said, labels=numbers, average=average, zero_division=ZERO)
        matthews = metrics.matthews_corrcoef(true, said)
    return {
        "accuracy": float(metrics.accuracy_score(true, said)),
        "f1": float(f1),
        "matthews": float(matthews),
    }


def of_sets(true: Any, said: Any) -> dict[str, float]:
    """Several labels per row: indicators [rows, labels]. accuracy: rows whose labels are all right."""
    from sklearn import metrics  # heavy: only measuring needs it

    return {
        "accuracy": float(metrics.accuracy_score(true, said)),
        "f1": float(metrics.f1_score(true, said, average="macro", zero_division=ZERO)),
        "micro_f1": float(metrics.f1_score(true, said, average="micro", zero_division=ZERO)),
    }


def of_numbers(true: Sequence[float], said: Sequence[float]) -> dict[str, float]:
    """Regression. A correlation that is not defined (all numbers alike) is 0."""
    from scipy import stats  # heavy: only measuring needs it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: dict[str, Any] = {
            "pearson": stats.pearsonr(true, said),
            "spearman": stats.spearmanr(true, said),
        }
    values = {name: float(result.statistic) for name, result in found.items()}
    return {name: value if value == value else 0.0 for name, value in values.items()}


def of_tokens(true: Sequence[int], said: Sequence[int], outside: int | None) -> dict[str, float]:
    """A label per token. micro_f1: over the labels that are not `outside` (O)."""
    from sklearn import metrics  # heavy: only measuring needs it

    inside = sorted({*true, *said} - {outside})
    f1 = metrics.f1_score(true, said, labels=inside, average="micro", zero_division=ZERO) if inside else 0.0
    return {"accuracy": float(metrics.accuracy_score(true, said)), "micro_f1": float(f1)}
