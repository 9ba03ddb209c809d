"""mlx: mlx-lm and LM Studio on Apple silicon, which read its own format."""

from .base import Server


class Mlx(Server):
    name = "mlx"
    formats = ("mlx",)
