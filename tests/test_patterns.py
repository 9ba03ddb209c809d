"""Patterns over layer names: what they match, and that none of them runs for ever."""

from __future__ import annotations

import time

import pytest

from lowbit_ft.names import PatternError, did_you_mean, matches, pattern_error

NAME = "model.layers.12.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("q_proj", True),
        ("self_attn.q_proj", True),
        ("proj", False),
        ("*.layers.12.*", True),
        ("*.mlp.*", False),
        (r"model\.layers\.\d+\..*", True),
        (r"layers\.\d+", False),
        (r".*\.(q|k)_proj", True),
        (r"model\.layers\.1{1,2}.*", True),
        ("(", False),
    ],
)
def test_what_a_pattern_means(pattern: str, meant: bool) -> None:
    assert matches(pattern, NAME) is meant


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(?R)*", "takes more than"),
        (r"(?:model|m.*).*(.*.*.*.*.*.*)\1+X", "takes more than"),
        ("(?:a{60000}){60000}", "counts multiply to 3600000000"),
        ("a" * 1001, "1001 characters"),
    ],
)
def test_a_pattern_without_an_end_is_refused(pattern: str, message: str) -> None:
    began = time.process_time()
    with pytest.raises(PatternError, match=message):
        matches(pattern, NAME + "a" * 40)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("pattern", ["(.*)*(.*)*X", "(a|a)*b", "(.+a+)+(\\w+)+X", ".*" * 400 + "X"])
def test_repeats_in_repeats_end(pattern: str) -> None:
    began = time.process_time()
    assert not matches(pattern, NAME + "a" * 40)
    assert time.process_time() - began < 5


def test_what_is_wrong_with_a_pattern_is_said() -> None:
    assert pattern_error("(") and not pattern_error("*.mlp.*") and not pattern_error("a|b")
    assert "counts multiply" in pattern_error("x{2000}")
    assert did_you_mean("q_prj", ["q_proj"]) and not did_you_mean("q" * 5000, ["q_proj"])
