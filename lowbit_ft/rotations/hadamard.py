"""kind: hadamard. Every site that is asked for, in every layer (QuaRot, arXiv 2404.00456)."""

from .base import Asked, Chosen


def everywhere(asked: Asked) -> tuple[bool, Chosen]:
    return asked.r1, {site: (wanted,) * asked.layers for site, wanted in asked.sites.items()}
