"""export.server: what the named server cannot load is said before training, with the nearest that it can."""

import re

import pytest

from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.servers import SERVERS
from lowbit_ft.export.servers.base import nearest
from lowbit_ft.grid import BinaryGrid, IntGrid
from tests.recipe.recipe_text import GOOD, problems_with


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ([], None),
        (["quant.bits=2", "quant.symmetric=false"], None),
        (["quant.bits=8", "quant.symmetric=false", "quant.group_size=256"], None),
        (
            ["export.format=gguf"],
            "got 'vllm': vllm reads .*, not gguf; set export.format: compressed-tensors",
        ),
        (["export.format=gptq"], None),
        (
            ["export.format=gptq", "quant.bits=3"],
            r"symmetric, in groups .* set export.format: compressed-tensors, .* or quant.bits: 4 \(the near",
        ),
        (
            ["export.format=gptq_v2", "quant.symmetric=false"],
            r"or quant.symmetric: true \(the nearest grid\)",
        ),
        (["export.format=gptq", "quant.group_size=256"], r"or quant.group_size: 128 \(the nearest grid\)"),
        (["export.format=awq", "quant.symmetric=false"], None),
        (["quant.overrides=[{match: '*.q_proj', bits: 8}]"], "k_proj, v_proj as one layer"),
        (["quant.kv_cache={bits: 8}"], None),
        (["quant.kv_cache={bits: 8, kind: block}"], "vllm has no cache of 8 bits by block"),
        (["quant.activations={bits: 8}"], None),
        (
            ["export.server=llama.cpp"],
            "llama.cpp reads gguf, not compressed-tensors; set export.format: gguf",
        ),
        (["export.server=llama.cpp", "export.format=gguf"], None),
        (["export.server=llama.cpp", "export.format=gguf", "quant.kv_cache={bits: 4, kind: block}"], None),
        (
            ["export.server=llama.cpp", "export.format=gguf", "quant.kv_cache={bits: 4}"],
            "llama.cpp has no cache of 4 bits by token_head",
        ),
        (["export.server=mlx"], "mlx reads mlx, not compressed-tensors; set export.format: mlx"),
        (["export.server=transformers", "export.format=native", "quant.kv_cache={bits: 4}"], None),
        (["export.server=transformers", "quant.kv_cache={bits: 4}"], "transformers has no cache of 4 bits"),
        (["export.server=transformers", "quant.activations={bits: 8}"], "another rule than training"),
        (["export.server=any", "export.format=gptq", "quant.bits=3"], None),
    ],
)
def test_what_a_server_cannot_load_is_refused(overrides: list[str], expected: str | None) -> None:
    problems = problems_with(GOOD, ("export.server=vllm", "export.verify=false", *overrides))
    mine = [line for line in problems if "export.server" in line]
    if expected is None:
        assert not mine, mine
    else:
        assert len(mine) == 1 and re.search(expected, mine[0]), problems


def test_the_nearest_grid_changes_what_it_must() -> None:
    wanted = IntGrid(bits=3, group_size=128, symmetric=False)
    assert nearest(wanted, lambda g: g.bits == 4 and g.symmetric) == "quant.bits: 4, quant.symmetric: true"
    assert nearest(wanted, lambda g: g.bits in (2, 4)) == "quant.bits: 4", "more bits before fewer"
    assert nearest(wanted, lambda g: g.group_size in (32, 256)) == "quant.group_size: 256"
    assert nearest(wanted, lambda g: False) is None
    assert nearest(BinaryGrid(bits=3, group_size=32), lambda g: True) is None


def test_the_formats_of_servers_are_formats() -> None:
    assert all(set(server.formats) <= set(EXPORTERS) for server in SERVERS.values())
    assert all(name == server.name for name, server in SERVERS.items())
    read = {name for server in SERVERS.values() for name in server.formats}
    assert read == set(EXPORTERS), "a format that no server reads"
