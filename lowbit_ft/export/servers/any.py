"""any: no server is named, and only what the format itself holds is asked."""

from ..base import Exporter
from .base import Server


class AnyServer(Server):
    name = "any"
    formats = ()

    def reject_format(self, exporter: Exporter) -> str | None:
        return None
