"""YAML that is nested too deep is refused at once: RecursionError at MAX_OPEN levels.

Python's own limit comes after seconds: what PyYAML's scanner does for one bracket grows with the number of
open ones.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_OPEN = 200


def plain_data(text: str) -> Any:
    """What a text says, of lists, dicts, strings, numbers, dates; yaml.YAMLError or RecursionError."""
    loader = ShallowLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class ShallowLoader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_OPEN:
            raise RecursionError(f"more than {MAX_OPEN} levels of YAML")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node
