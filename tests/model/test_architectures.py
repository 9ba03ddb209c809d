"""Every architecture of docs/models.md through the whole line; the page says what this test finds, row by
row.
"""

from pathlib import Path

import pytest

from tests.architectures import CONFIGS
from tests.whole_line import EXACT, line, lines

pytestmark = pytest.mark.no_cover  # every line of ours is counted elsewhere; counting takes a third more time
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
# Not one of these may be lost: exact in our own format, and in compressed-tensors too but for those that say
# why not.
PROMISED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "opt",
    "gpt_neox",
    "falcon",
    "olmo2",
    "stablelm",
    "glm",
    "granite",
    "gpt_oss",
)
STACKED = "one tensor per expert"
NATIVE_ONLY = {
    "gpt2": "Conv1D",
    "openai-gpt": "Conv1D",
    "gpt_oss": STACKED,
    "granitemoe": STACKED,
    "granitemoehybrid": STACKED,
    "mamba": "does not divide 4 inputs",
    "jamba": "does not divide 8 inputs",
    "recurrent_gemma": "does not divide 48 inputs",
}
REFUSED = {"llama4_text", "dbrx", "jetmoe", "rwkv"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_line(name: str, tmp_path: Path) -> None:
    result, *rest = lines(name, tmp_path)
    if name in REFUSED:
        assert result.native.startswith("refused: ") and all(row.native == EXACT for row in rest)
        assert len(rest) == len(result.fixes[:1]) == (name != "rwkv"), (
            "every refusal but this names a way out"
        )
    else:
        assert result.native == EXACT and result.packed > 90
        if name in NATIVE_ONLY:
            assert result.compressed.startswith("refused: ") and NATIVE_ONLY[name] in result.compressed
        else:
            assert "refused" not in result.compressed
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert {row.row() for row in (result, *rest)} <= set(page), "run: python -m benchmarks.support_matrix"


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "gpt_oss"])
def test_the_whole_line_in_bfloat16(name: str, tmp_path: Path) -> None:
    result = line(name, tmp_path, "bfloat16")
    assert result.native == EXACT and (result.compressed == EXACT or name in NATIVE_ONLY)


def test_the_list_and_the_page_are_whole() -> None:
    assert set(PROMISED) <= set(CONFIGS) and len(CONFIGS) >= 30
    rows = [row for row in PAGE.read_text(encoding="utf-8").splitlines() if row.startswith("| ")]
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows[2:]]
    assert [name for name in names if not name.endswith(", the rest")] == list(CONFIGS)
