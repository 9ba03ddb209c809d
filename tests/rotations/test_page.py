"""docs/rotations.md lists every architecture that has a line, under the sites that it is refused."""

import re
from pathlib import Path

from lowbit_ft.rotations import FAMILIES, SITES
from tests.architectures import CONFIGS
from tests.rotations.test_law import REFUSED

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rotations.md"


def test_the_architectures_of_the_page_are_those_of_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    listed = text.partition("<!-- families -->")[2].partition("<!-- end -->")[0]
    told = {
        name: paragraph.partition(",")[0].strip()
        for paragraph in listed.strip().split("\n\n")
        for name in re.findall(r"`([\w-]+)`", paragraph)
    }
    assert told.keys() == FAMILIES.keys()
    names = {config().model_type: name for name, config in CONFIGS.items()}
    for model_type, first in told.items():
        refused = REFUSED.get(names[model_type], {})
        if first.startswith("All sites"):
            assert not refused, model_type
        else:
            assert any(first.startswith(f"Not {site}") for site in refused), (model_type, first, refused)
    assert (
        f"Written down for\n  {len(FAMILIES)} architectures" in (PAGE.parents[1] / "CHANGELOG.md").read_text()
    )
    assert all(f"| `{site}` |" in text for site in ("r1", *SITES))
