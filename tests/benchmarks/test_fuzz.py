"""benchmarks/fuzz.py in short: a hundred files cut, edited or meant to harm are all taken or answered; and
the judge knows each class of what it looks for.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from benchmarks.fuzz import fuzz, honest_files, judged
from benchmarks.fuzz_doors import KINDS, Nonsense
from benchmarks.fuzz_mutate import mutate_bytes, mutate_tree


@pytest.mark.slow
def test_a_hundred_bad_files_are_taken_or_answered(tmp_path: Path) -> None:
    honest = tmp_path / "honest"
    honest.mkdir()
    honest_files(honest)
    found = fuzz(honest, range(100), seed=1, limit=60.0)
    assert found["offenders"] == []
    assert found["cases"] == 100 and set(found["counts"]) == set(KINDS)
    told = sum(counts.get("answered", 0) for counts in found["counts"].values())
    assert 30 <= told < 100, "most changes are noticed, and some files are fine as they are"


def test_the_judge_tells_the_classes_apart(tmp_path: Path) -> None:
    def hang() -> None:
        time.sleep(30)

    def wrong() -> None:
        raise Nonsense("two")

    def raises(error: Exception):
        def door() -> None:
            raise error

        return door

    assert judged(lambda: None, tmp_path, 5.0) == ("fine", "")
    assert judged(hang, tmp_path, 0.2)[0] == "hang"
    assert judged(wrong, tmp_path, 5.0) == ("nonsense", "two")
    assert judged(raises(KeyError("a")), tmp_path, 5.0)[0] == "traceback"
    assert judged(raises(ValueError("a")), tmp_path, 5.0)[0] == "nameless"
    assert judged(raises(ValueError(f"{tmp_path}/a: b")), tmp_path, 5.0)[0] == "answered"
    assert judged(raises(OSError(2, "no", "a")), tmp_path, 5.0)[0] == "answered"


def test_a_case_is_the_same_again_and_changes_something() -> None:
    tree = {"a": {"b": [1, 2]}, "c": "d"}
    made = [mutate_tree(tree, random.Random(seed)) for seed in range(50)]
    assert repr(made) == repr([mutate_tree(tree, random.Random(seed)) for seed in range(50)])
    assert tree == {"a": {"b": [1, 2]}, "c": "d"}
    assert sum(repr(new) != repr(tree) for new, _ in made) > 40
    data = b"a: 1\nb: [1, 2, 3]\n"
    assert len({mutate_bytes(data, random.Random(seed))[0] for seed in range(200)}) > 30
