"""PEFT's own tests on our method, the short form: all of them are `python -m benchmarks.peft_suite`."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import peft_suite
from lowbit_ft.adapters import ADAPTERS

pytestmark = pytest.mark.no_cover  # what runs here is counted in the tests beside this one
SHORT = {
    "test_save_pretrained": "lr_qat",
    "test_save_pretrained_pickle": "lr_qat",
    "test_merge_layers": "dl_qat",
    "test_merge_layers_multi": "l4q",
    "test_delete_adapter": "scale",
    "test_training_decoders_layer_indexing": "lr_qat",
    "test_adding_multiple_adapters_with_bias_raises": "lr_qat",
    "test_disable_adapter": "alpha_tuning",
    "_test_merge_layers_is_idempotent": "ef_qat",
}
# PEFT skips the last two of these for a method that has no such key, which a TypeError says.
OUTCOMES = {
    "test_save_pretrained_pickle": "refused: safe_serialization=False",
    "test_merge_layers_multi": "refused: one adapter can be active at a time",
    "test_training_decoders_layer_indexing": "PEFT: This PEFT method does not support layers_to_transform",
    "test_adding_multiple_adapters_with_bias_raises": "PEFT: .* does not support the 'bias' argument",
}


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    folder = peft_suite.suite_folder()
    if not folder.is_dir():
        pytest.skip(f"PEFT's tests are not in {folder}: python -m benchmarks.peft_suite --fetch")
    return peft_suite.theirs(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("test", SHORT)
def test_one_of_theirs(test: str, suite: ModuleType, models: Path) -> None:
    (result,) = peft_suite.run(suite, [test], ["conv1d"], [SHORT[test]], models)
    wanted = OUTCOMES.get(test)
    assert result.outcome == ("passed" if wanted is None else "not applicable"), str(result)
    if wanted is not None:
        assert peft_suite.re.match(wanted, result.reason), result.reason


def test_every_test_of_theirs_is_run_or_has_its_reason(suite: ModuleType) -> None:
    listed = peft_suite.tests_of(suite)
    general = {name for name, more in listed.items() if more}
    assert len(general) >= 40 and len(listed) - len(general) <= 20
    assert {*peft_suite.NOT_OURS, *peft_suite.REFUSED, *peft_suite.INEXACT, *SHORT} <= general
    assert set(SHORT.values()) <= set(ADAPTERS)
