"""Which implementation of an op runs, and with which tile sizes.

Every op is declared with its reference beside it, and the reference is the default for all devices. This
module adds the Triton implementation for CUDA tensors (`register`, called once on import of the package): a
thin function that imports the `*_triton` module at the first CUDA call, so that importing the package needs
neither Triton nor a GPU. Where Triton is missing the reference runs instead, after one warning.

Tile sizes come from a table, never from a search at run time: the first call costs a compile and nothing
else. An entry of the table says for which architecture, bits, dtype and range of M, N, K it was made; a
missing field means any. `config` returns, of those that fit, the one made for the nearest case. The packaged
table is configs.json; `bench.py tune` measures on a machine at hand and writes the same format to the user's
cache, which is read after it and wins ties.

    {"packed_matmul": [{"arch": 90, "bits": 4, "dtype": "bf16", "m": [1, 16], "config": {"BLOCK_N": 128,
    ...}}, ...], ...}

Architecture 0 is the Triton interpreter on a CPU: small tiles, because it is slow. It takes no entry that is
open to every architecture.
"""

import contextlib
import functools
import importlib
import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layout import LANES, outside_autocast

PACKAGED = Path(__file__).with_name("configs.json")
INTERPRETER = 0
# Streaming multiprocessors of the usual board of an architecture, for split-K where no device can be asked.
_PROCESSORS = {INTERPRETER: 4, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# What `override` puts in front of the tables. For all threads: a backward pass on a GPU runs on a thread of
# its own.
_override: dict[str, dict[str, Any]] = {}

# op name -> (module of the reference, module of the launcher). The launcher has the op's name and its
# arguments.
KERNELS = {
    "packed_matmul": ("matmul", "matmul_triton"),
    "packed_matmul_dx": ("matmul", "matmul_triton"),
    "dequantize": ("pack", "matmul_triton"),
    "pack": ("pack", "pack_triton"),
    "unpack": ("pack", "pack_triton"),
    "quantize_pack": ("pack", "pack_triton"),
    "grid_codes": ("codes", "codes_triton"),
    "grid_gradients": ("grid_linear", "gradients_triton"),
    "grid_row_gradients": ("grid_rows", "grid_rows_triton"),
    "binary_dequantize": ("binary", "binary_triton"),
    "binary_matmul": ("binary", "binary_triton"),
    "binary_matmul_dx": ("binary", "binary_triton"),
    "binary_gradients": ("binary", "binary_gradients_triton"),
    "hadamard": ("hadamard", "hadamard_triton"),
}


# ------------------------------------------------------------------------------------------------ tile sizes


def architecture() -> int:
    """Compute capability of the current CUDA device as 10 * major + minor; INTERPRETER without one. Call it
    inside the device guard: with several different GPUs the answer depends on the current one."""
    if not torch.cuda.is_available():
        return INTERPRETER
    return _capability(torch.cuda.current_device())


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _device_processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(arch: int | None = None) -> int:
    """Streaming multiprocessors of the current device, or of the usual board of `arch`."""
    if arch is None and torch.cuda.is_available():
        return _device_processors(torch.cuda.current_device())
    return _PROCESSORS.get(INTERPRETER if arch is None else arch, 128)


def split_k(blocks: int, steps: int, arch: int | None = None, waves: float = 2.0) -> int:
    """In how many parts to split `steps` K steps so that `blocks` output blocks fill `waves` waves of the
    device: a power of two, at least 1, at most the number of steps."""
    want = max(1.0, waves * processors(arch) / max(1, blocks))
    return max(1, min(1 << int(math.log2(want)), 1 << int(math.log2(max(1, steps)))))


def user_cache() -> Path:
    """The user's table: $LOWBIT_KERNELS_CACHE, or lowbit_kernels/configs.json in the user's cache folder."""
    if path := os.environ.get("LOWBIT_KERNELS_CACHE"):
        return Path(path)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "lowbit_kernels" / "configs.json"


def read_table(path: Path) -> dict[str, list[dict[str, Any]]]:
    """A table file, checked. ValueError naming the file and the entry where it is not one."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: not a readable table of kernel configurations ({error}); delete or fix it"
        ) from error
    if not isinstance(table, dict):
        raise ValueError(
            f"{path}: expected an object of op names, got {type(table).__name__}; delete or fix it"
        )
    for op, entries in table.items():
        if op not in KERNELS:
            raise ValueError(f"{path}: {op!r} is not an op; allowed are {sorted(KERNELS)}")
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
                raise ValueError(
                    f"{path}: {op}: each entry is an object with a 'config' object, got {entry!r}"
                )
            for axis in ("m", "n", "k"):
                span = entry.get(axis, [1, 2])
                numbers = isinstance(span, list) and all(isinstance(v, int) and v > 0 for v in span)
                if not numbers or len(span) != 2 or span[0] > span[1]:
                    raise ValueError(
                        f"{path}: {op}: {axis!r} is [lowest, highest], two positive integers, got {span!r}"
                    )
    return table


@functools.cache
def _packaged() -> dict[str, list[dict[str, Any]]]:
    return read_table(PACKAGED)


@functools.cache
def _tables() -> dict[str, list[dict[str, Any]]]:
    """Packaged entries followed by the user's; the later of two equals wins."""
    table = {op: list(entries) for op, entries in _packaged().items()}
    mine = user_cache()
    if mine.is_file():
        try:
            for op, entries in read_table(mine).items():
                table.setdefault(op, []).extend(entries)
        except ValueError as error:
            # A broken cache must not stop a training run: the packaged table is always there.
            warnings.warn(
                f"user table of kernel configurations ignored: {error}", RuntimeWarning, stacklevel=3
            )
    return table


def reload() -> None:
    """Forget the tables read so far (after the tuner wrote new ones)."""
    _tables.cache_clear()
    _remembered.cache_clear()


# What an entry pays for each field it leaves open, in octaves of N or K: one made for the case at hand wins.
# The dtype pays most, so that fp32 inputs, for which the BLAS is right everywhere, need one entry and not one
# per architecture.
_OPEN = {"dtype": 16.0, "arch": 8.0, "bits": 2.0, "n": 4.0, "k": 4.0}


def _distance(entry: dict[str, Any], call: dict[str, Any]) -> float:
    """How far an entry is from a call, in octaves of N and K; infinite where another field is not the
    call's.
    """
    if call["arch"] == INTERPRETER and "arch" not in entry:
        return math.inf
    cost = 0.0
    for name in ("arch", "bits", "dtype"):
        if entry.get(name, call[name]) != call[name]:
            return math.inf
        cost += 0.0 if name in entry else _OPEN[name]
    if "m" in entry and not entry["m"][0] <= call["m"] <= entry["m"][1]:
        return math.inf  # M decides the regime
    for axis in ("n", "k"):
        cost += _octaves(entry[axis], call[axis]) if axis in entry else _OPEN[axis]
    return cost


def _octaves(span: list[int], value: int) -> float:
    """Octaves from `value` to the range; 0 inside it."""
    if span[0] <= value <= span[1]:
        return 0.0
    return abs(math.log2(value / (span[0] if value < span[0] else span[1])))


def _nearest(table: dict[str, list[dict[str, Any]]], op: str, call: dict[str, Any]) -> dict[str, Any]:
    best, least = None, math.inf
    for entry in table.get(op, ()):
        cost = _distance(entry, call)
        if cost < math.inf and cost <= least:
            best, least = entry, cost
    if best is None:
        case = ", ".join(f"{name} {value}" for name, value in call.items())
        raise ValueError(f"no configuration of {op} for {case} in {PACKAGED.name}")
    return best["config"]


@functools.lru_cache(maxsize=4096)
def _remembered(op: str, arch: int, bits: int, dtype: str, m: int, n: int, k: int) -> dict[str, Any]:
    return _nearest(_tables(), op, {"arch": arch, "bits": bits, "dtype": dtype, "m": m, "n": n, "k": k})


def config(
    op: str, bits: int, dtype: torch.dtype, M: int, N: int, K: int, arch: int | None = None
) -> dict[str, Any]:
    """Tile sizes and launch options of `op` for a problem: a fresh dict of what the nearest entry holds.

    Raises ValueError where the table has nothing at all for the op on this architecture.
    """
    if op in _override:
        return dict(_override[op])
    arch = architecture() if arch is None else arch
    return dict(_remembered(op, arch, bits, _DTYPES[dtype], max(1, M), max(1, N), max(1, K)))


def packaged(op: str, bits: int, dtype: torch.dtype, M: int, N: int, K: int, arch: int) -> dict[str, Any]:
    """`config` of the packaged table alone: what we ship, whatever this machine's user has tuned."""
    call = {"arch": arch, "bits": bits, "dtype": _DTYPES[dtype], "m": M, "n": N, "k": K}
    return dict(_nearest(_packaged(), op, call))


@contextlib.contextmanager
def override(op: str, values: dict[str, Any]) -> Iterator[None]:
    """Inside the block `config(op, ...)` returns `values`, on every thread: for the tuner and for tests of
    one configuration.
    """
    before = dict(_override)
    _override[op] = values
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)


# -------------------------------------------------------------------------------------------- implementations


@functools.cache
def launcher(op: str) -> Callable[..., Any] | None:
    """The Triton launcher of an op, imported now. None where $LOWBIT_KERNELS says reference (to tell a
    kernel's mistake from another), and, after one warning for all ops, where Triton cannot be imported."""
    wanted = os.environ.get("LOWBIT_KERNELS", "triton")
    if wanted not in ("triton", "reference"):
        raise ValueError(f"LOWBIT_KERNELS={wanted!r}: allowed are triton (the default) and reference")
    if wanted == "reference" or not _has_triton():
        return None
    return getattr(importlib.import_module(f".{KERNELS[op][1]}", __package__), op)


@functools.cache
def _has_triton() -> bool:
    try:
        importlib.import_module("triton.language")
    except ImportError as error:
        warnings.warn(
            f"Triton cannot be imported ({error}): lowbit_kernels runs its reference implementations on "
            "the GPU, which are "
            "correct but several times slower. Install triton to use the kernels.",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True


def definition(op: str) -> Any:
    """The torch.library.CustomOpDef of an op."""
    return getattr(importlib.import_module(f".{KERNELS[op][0]}", __package__), op)


def takes(arguments: dict[str, Any]) -> bool:
    """Whether the kernels can take a call. They read floats of at most 32 bits, and groups that are a
    multiple of 32 channels or the whole row, so that a run of 32 channels never needs two scales. The
    reference takes everything else."""
    x = arguments.get("x", arguments.get("dy", arguments.get("weight")))
    if x is not None and x.dtype not in _DTYPES or arguments.get("dtype", torch.float32) not in _DTYPES:
        return False
    group_size, channels = arguments.get("group_size", -1), arguments.get("in_features")
    if channels is None and x is not None:
        channels = x.shape[-1]
    return group_size == -1 or group_size % LANES == 0 or (channels is not None and group_size >= channels)


def _implementation(op: str) -> Callable[..., Any]:
    reference = definition(op)._init_fn  # what @custom_op was given; it has no public name
    names = tuple(inspect.signature(reference).parameters)

    @outside_autocast
    @functools.wraps(reference)
    def run(*args: Any, **kwargs: Any) -> Any:
        kernel = launcher(op)
        if kernel is None or not takes({**dict(zip(names, args, strict=False)), **kwargs}):
            return reference(*args, **kwargs)
        device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        # Triton launches on the current device and its current stream, whatever device the tensors are on. A
        # CPU tensor gets here only under the interpreter.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return _apart(kernel(*args, **kwargs))

    return run


def _apart(result: Any) -> Any:
    """Results that share memory, copied apart: an op may not return two views of one buffer, which launchers
    like to cut.
    """
    if not isinstance(result, tuple):
        return result
    seen: set[int] = set()
    own = []
    for tensor in result:
        storage = tensor.untyped_storage().data_ptr()
        own.append(tensor.clone() if storage in seen and tensor.numel() else tensor)
        seen.add(storage)
    return tuple(own)


def register(device_type: str = "cuda") -> None:
    """Put the Triton implementation of every op behind its name for tensors of a device type. "cpu" is for
    the interpreter (TRITON_INTERPRET=1 before the first import), where it replaces the reference for the rest
    of the process."""
    for op in KERNELS:
        definition(op).register_kernel(device_type)(_implementation(op))
