"""Names as people write them: patterns over layer names, and the known word nearest to a mistyped one.

Below everything that has names: recipes, adapters, exporters and adapter folders all say what was meant with
these.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable

# What other tools call the same thing: PEFT's LoraConfig, transformers' TrainingArguments.
ELSEWHERE = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "init_lora_weights": "init",
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size",
}


def matches(pattern: str, name: str) -> bool:
    """Whether a layer name is meant by `pattern`: its last part(s) ("q_proj"), a glob ("*.layers.0.*"), or a
    full regex match.
    """
    if name == pattern or name.endswith("." + pattern) or fnmatch.fnmatchcase(name, pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except (re.error, OverflowError, RecursionError):
        return False  # a glob such as "*.mlp.*" is not a regex


def nearest(word: object, allowed: Iterable[object]) -> str:
    """The allowed word that was meant: what another tool's word for it is here, or the closest one to what
    was typed; '' when none is close."""
    by_lower = {str(name).lower(): str(name) for name in allowed}
    if (ours := ELSEWHERE.get(str(word).lower())) in by_lower:
        return by_lower[ours]
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[close[0]] if close else ""


def did_you_mean(word: object, allowed: Iterable[object]) -> str:
    """ "; did you mean 'x'?" or nothing."""
    close = nearest(word, allowed)
    return f"; did you mean '{close}'?" if close else ""


def listed(names: Iterable[object]) -> str:
    """'a, b, c'."""
    return ", ".join(map(str, names))


def pattern_error(pattern: str) -> str:
    """What is wrong with a pattern that is neither a glob nor a regex, or ''."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return "" if any(character in pattern for character in "*?[") else str(error)
    return ""
