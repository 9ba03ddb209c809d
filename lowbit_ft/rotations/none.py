"""kind: none. Nothing is turned."""

from .base import Asked, Chosen, nowhere


def none(asked: Asked) -> tuple[bool, Chosen]:
    return False, nowhere(asked)
