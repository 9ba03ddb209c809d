"""The table of configurations, the user's cache, and what happens where Triton or the right arguments are
missing.
"""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import lowbit_kernels as lk
import pytest
import torch
from lowbit_kernels import dispatch


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "configs.json"
    monkeypatch.setenv("LOWBIT_KERNELS_CACHE", str(path))
    dispatch.reload()
    yield path
    dispatch.reload()


def test_importing_needs_no_triton():
    code = "import sys, lowbit_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("arch", [0, 75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("op", dispatch.KERNELS)
def test_every_op_has_a_configuration_everywhere(op, arch):
    for bits in (1, 2, 3, 4, 6, 8):
        for m in (1, 16, 17, 64, 300, 5000):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                got = dispatch.config(op, bits, dtype, m, 4096, 4096, arch)
                assert got.get("num_warps", 4) in (1, 2, 4, 8)
                if got.get("regime") == "decode":
                    assert m <= 16


def test_the_regime_follows_m_and_the_architecture():
    def regime(m: int, arch: int, dtype: torch.dtype = torch.bfloat16) -> str:
        return dispatch.config("packed_matmul", 4, dtype, m, 4096, 4096, arch)["regime"]

    assert [regime(m, 90) for m in (1, 16, 17, 512, 4096)] == [
        "decode",
        "decode",
        "fused",
        "fused",
        "two_stage",
    ]
    assert regime(4096, 89) == "fused"
    assert regime(4096, 90, torch.float32) == "two_stage"


def test_the_user_s_entry_wins_for_its_shape_only(cache: Path):
    packaged = dispatch.config("hadamard", 16, torch.bfloat16, 100, 4096, 4096, 90)
    mine = {"ROWS": 128, "STEP": 32, "num_warps": 8, "num_stages": 2}
    entry = {
        "arch": 90,
        "bits": 16,
        "dtype": "bf16",
        "m": [64, 128],
        "n": [4096, 4096],
        "k": [4096, 4096],
        "config": mine,
    }
    cache.write_text(json.dumps({"hadamard": [entry]}))
    dispatch.reload()
    assert dispatch.config("hadamard", 16, torch.bfloat16, 100, 4096, 4096, 90) == mine
    assert dispatch.config("hadamard", 16, torch.bfloat16, 1 << 20, 4096, 4096, 90) == packaged
    assert dispatch.config("hadamard", 16, torch.bfloat16, 100, 4096, 4096, 0) != mine, (
        "the interpreter took a GPU's entry"
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not a readable table"),
        ("[]", "expected an object"),
        ('{"matmul": []}', "is not an op"),
        ('{"pack": [{"arch": 90}]}', "'config' object"),
        ('{"pack": [{"m": [4, 1], "config": {}}]}', "two positive integers"),
        ('{"pack": [{"k": 4, "config": {}}]}', "two positive integers"),
    ],
)
def test_a_broken_cache_is_named_and_ignored(cache: Path, text: str, what: str):
    packaged = dispatch.config("pack", 4, torch.float32, 1, 64, 64, 90)
    cache.write_text(text)
    dispatch.reload()
    with pytest.warns(RuntimeWarning, match="ignored") as caught:
        assert dispatch.config("pack", 4, torch.float32, 1, 64, 64, 90) == packaged
    assert what in str(caught[0].message) and str(cache) in str(caught[0].message)


def test_an_override_holds_inside_its_block():
    before = dispatch.config("pack", 4, torch.float32, 1, 64, 64)
    with dispatch.override("pack", {"BLOCK_N": 7}):
        assert dispatch.config("pack", 4, torch.float32, 1, 64, 64) == {"BLOCK_N": 7}
    assert dispatch.config("pack", 4, torch.float32, 1, 64, 64) == before


def test_changing_a_returned_configuration_changes_nothing():
    dispatch.config("pack", 4, torch.float32, 1, 64, 64)["BLOCK_N"] = -1
    assert dispatch.config("pack", 4, torch.float32, 1, 64, 64)["BLOCK_N"] > 0


def test_no_configuration_is_an_error():
    with pytest.raises(ValueError, match="no configuration of nothing"):
        dispatch.config("nothing", 4, torch.float32, 1, 64, 64)


@pytest.mark.parametrize(("blocks", "steps"), [(1, 1), (1, 100), (32, 32), (1000, 28), (32, 3)])
def test_split_k(blocks, steps):
    parts = dispatch.split_k(blocks, steps, arch=90)
    assert 1 <= parts <= steps and parts & (parts - 1) == 0
    assert parts == 1 or parts * blocks <= 2 * 132


def test_without_triton_the_reference_runs_after_one_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton.language", None)
    dispatch._has_triton.cache_clear()
    dispatch.launcher.cache_clear()
    x = torch.randn(3, 64)
    try:
        run = dispatch._implementation("hadamard")
        with pytest.warns(RuntimeWarning, match="Install triton"):
            got = run(x, -1)
        assert torch.equal(got, lk.hadamard(x, -1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(x, -1)
            dispatch._implementation("pack")(torch.zeros(1, 32, dtype=torch.uint8), 4)
    finally:
        dispatch._has_triton.cache_clear()
        dispatch.launcher.cache_clear()


def test_the_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch):
    try:
        monkeypatch.setenv("LOWBIT_KERNELS", "reference")
        dispatch.launcher.cache_clear()
        assert dispatch.launcher("pack") is None
        monkeypatch.setenv("LOWBIT_KERNELS", "fast")
        dispatch.launcher.cache_clear()
        with pytest.raises(ValueError, match="triton .* and reference"):
            dispatch.launcher("pack")
    finally:
        dispatch.launcher.cache_clear()


def test_what_the_kernels_do_not_take_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple] = []

    def kernel(*args):
        asked.append(args)
        return args[0]

    monkeypatch.setattr(dispatch, "launcher", lambda op: kernel)
    run = dispatch._implementation("packed_matmul")
    codes, x = lk.pack(torch.ones(2, 96, dtype=torch.uint8), 4), torch.randn(1, 96)
    for group_size, dtype, taken in [
        (32, torch.float32, 1),
        (-1, torch.float32, 1),
        (128, torch.float32, 1),
        (48, torch.float32, 0),
        (32, torch.float64, 0),
        (100, torch.float32, 1),
    ]:
        asked.clear()
        run(x.to(dtype), codes, torch.ones(lk.group_count(96, group_size), 2), None, None, 4, group_size)
        assert len(asked) == taken, (group_size, dtype)


def test_results_that_share_memory_are_copied_apart():
    both = torch.arange(6.0).view(2, 3)
    first, second, empty = dispatch._apart((both[0], both[1], torch.empty(0)))
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert second.tolist() == [3.0, 4.0, 5.0] and empty.numel() == 0
