"""export.server: whether the named server loads what this recipe ships, with the nearest that it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...export import EXPORTERS, Exporter
from ...export.planes import held
from ...export.servers import SERVERS, Server
from ...export.servers.base import nearest
from ...grid import Grid
from ..layers import shapes_here
from ..yaml import KeyPath, Problem, dotted
from .base import Problems
from .quant import grids

HERE = ("export", "server")


def check_server(r: Any) -> Problems:
    """The format, every grid, the layers that are run as one, quantized inputs and the cache."""
    server, exporter = SERVERS[r.export.server], EXPORTERS[r.export.format]
    if reason := server.reject_format(exporter):
        yield Problem(HERE, f"got {server.name!r}: {reason}; set export.format: {server.formats[0]}")
        return
    told = set()
    for path, grid in _shipped(r, exporter):
        if exporter.reject(grid):
            continue  # check_export tells
        if (reason := server.reject(exporter, grid)) and reason not in told:
            told.add(reason)
            where = "" if path == ("quant",) else f" (for {dotted(path)})"
            yield Problem(HERE, f"got {server.name!r}{where}: {reason}; {_way_out(server, exporter, grid)}")
    if r.quant.activations is not None and (reason := server.reject_activations(exporter)):
        yield Problem(HERE, f"got {server.name!r}: {reason}")
    if server.formats and r.quant.kv_cache is not None and r.quant.kv_cache.config().reject() is None:
        if reason := server.reject_kv_cache(exporter, r.quant.kv_cache.config()):
            yield Problem(HERE, f"got {server.name!r}: {reason}")
    shapes = shapes_here(r.model.path, r.model.revision) if hasattr(r, "model") else None
    if shapes is None:
        return
    try:
        packed = {
            layer.name: r.quant.grid_for(layer.name) if r.quant.skip_reason(layer.name) is None else None
            for layer in shapes.linears
        }
    except ValueError:
        return  # bits the grid does not have: check_grid told
    if reason := server.reject_layers(exporter, packed):
        yield Problem(HERE, f"got {server.name!r}: {reason}")


def _shipped(r: Any, exporter: Exporter) -> Iterator[tuple[KeyPath, Grid]]:
    """(key path, grid in the file) of the recipe's grid and of every override."""
    config = getattr(r, "adapter", None)
    for path, grid in grids(r):
        if config is not None and config.grid_name == grid.kind:
            grid = config.shipped(grid)
        yield path, held(exporter, grid)


def _way_out(server: Server, exporter: Exporter, grid: Grid) -> str:
    """A format it reads that holds the very grid, and the nearest grid of this format."""
    other = next(
        (
            name
            for name in server.formats
            if not EXPORTERS[name].needs_activations
            and not EXPORTERS[name].reject(grid)
            and not server.reject(EXPORTERS[name], grid)
        ),
        None,
    )
    keys = nearest(grid, lambda g: not exporter.reject(g) and not server.reject(exporter, g))
    ways = [f"export.format: {other}, which it loads with this grid"] if other is not None else []
    ways += [f"{keys} (the nearest grid)"] if keys is not None else []
    return "set " + ", or ".join(ways or ["export.server: any"])
