"""Names as people write them: patterns over layer names, and the known word nearest to a mistyped one.

Below everything that has names: recipes, adapters, exporters and adapter folders all say what was meant with
these.
"""

from __future__ import annotations

import difflib
import fnmatch
import shlex
from collections.abc import Iterable, Sequence

import regex

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

HUB_ID = regex.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# Patterns come from recipes and from the config.json of strangers, and one such as (.*)*X takes longer than a
# life on a name of 40 letters. A form that is safe cannot be told by looking ((a|a)*b nests nothing), so
# `regex` matches them, which stops after a time: CPU seconds, so that a busy machine refuses no more than an
# idle one. An honest pattern takes microseconds.
MATCH_SECONDS = 0.2
MAX_PATTERN = 1000  # characters
MAX_REPEATS = 1000  # what the counts {m,n} of a pattern multiply to: `regex` writes them out when it compiles
_COUNTS = regex.compile(r"\{(\d*),?(\d*)\}")


_NO_REGEX = (regex.error, OverflowError, RecursionError)


class PatternError(ValueError):
    """A pattern that cannot be used on names: too long, or without an end."""


def matches(pattern: str, name: str) -> bool:
    """Whether a layer name is meant by `pattern`: its last part(s) ("q_proj"), a glob ("*.layers.0.*"), or a
    full regex match. PatternError for one that takes too long.
    """
    if name == pattern or name.endswith("." + pattern):
        return True
    _refuse_large(pattern)
    if fnmatch.fnmatchcase(name, pattern):
        return True
    try:
        return regex_matches(pattern, name, whole=True)
    except _NO_REGEX:
        return False  # a glob such as "*.mlp.*" is not a regex


def regex_matches(pattern: str, name: str, whole: bool = False) -> bool:
    """Whether a regex matches the name from its start, or the whole name. PatternError for one that is too
    long or takes too long; regex.error (and its kin) for one that is none."""
    _refuse_large(pattern)
    match = regex.fullmatch if whole else regex.match
    try:
        return match(pattern, name, timeout=MATCH_SECONDS) is not None
    except TimeoutError:
        raise PatternError(
            f"got the pattern {pattern!r}, which takes more than {MATCH_SECONDS} seconds on the name "
            f"{name!r}; write it without a repeat inside a repeat"
        ) from None


def _refuse_large(pattern: str) -> None:
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"got a pattern of {len(pattern)} characters; allowed: at most {MAX_PATTERN}")
    repeats = 1
    for least, most in _COUNTS.findall(pattern):
        repeats *= max(1, int((most or least or "1")[:9]))
    if repeats > MAX_REPEATS:
        raise PatternError(
            f"got the pattern {pattern!r}, whose counts multiply to {repeats}; allowed: at most {MAX_REPEATS}"
        )


def nearest(word: object, allowed: Iterable[object], cutoff: float = 0.5) -> str:
    """The allowed word that was meant: what another tool's word for it is here, or the closest one to what
    was typed; '' when none is close. cutoff: how much of the letters must be the same, in (0, 1]."""
    if len(str(word)) > MAX_PATTERN:
        return ""  # not a typing error, and comparing it takes as long as it is
    by_lower = {str(name).lower(): str(name) for name in allowed}
    if (ours := ELSEWHERE.get(str(word).lower())) in by_lower:
        return by_lower[ours]
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=cutoff)
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
        _refuse_large(pattern)
        regex.compile(pattern)
    except PatternError as error:
        return str(error)
    except _NO_REGEX as error:
        return "" if any(character in pattern for character in "*?[") else str(error)
    return ""


def without_folders(text: str) -> str:
    """The last part of a path from the root of a machine, or from somebody's home; any other text as it is.
    What is shown to others says no more of where things lie."""
    rooted = text.startswith(("/", "~", "\\\\")) or regex.match(r"[A-Za-z]:[\\/]", text) is not None
    return regex.split(r"[\\/]", text.rstrip("\\/"))[-1] if rooted else text


def kinds_of(names: Sequence[str]) -> str:
    """Layer names with their numbers left out, each once: 'model.layers.*.mlp.up_proj, ...'."""
    kinds = dict.fromkeys(regex.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return listed(list(kinds)[:8])


def nearest_layers(pattern: str, names: Sequence[str]) -> str:
    """What may have been meant by a pattern that matches no layer, and the kinds of layers there are."""
    ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
    word = regex.sub(r"[^\w]+", " ", pattern).split()
    return f"{did_you_mean(word[-1] if word else pattern, ends)}; the model has {kinds_of(names)}"


def python_line(code: str) -> str:
    """`python -c` with a line of code, for a shell: in double quotes where nothing in it means something to
    a shell there (to an interactive one too), else as shlex quotes it."""
    return f"python -c {shlex.quote(code)}" if {*code} & {*'"$`!\\\n'} else f'python -c "{code}"'
