"""Tile sizes for the GPU at hand: compile and check many configurations in parallel processes, then time the
right ones alone.

A case names the ops whose configuration it decides and, per op, the values of each coordinate; every
combination is a candidate, next to what the table has for its architecture. Compiling takes most of the time
and a core each, so it is dealt to processes; what they compile is in Triton's cache when this process times
it, alone on the device. The best per case goes to the user's table (dispatch.user_cache) as soon as it is
found, and every trial to --out.
"""

import argparse
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from bench_build import Built, build
from bench_cases import Case, tiny, tuned
from bench_time import checked, copies_of, device_of, measure, write
from lowbit_kernels import dispatch

DECODE = {"regime": ["decode"], "BLOCK_M": [16], "UNROLL": [1, 2], "num_stages": [2, 3]}
FUSED = {"regime": ["fused"], "num_stages": [3]}
TWO_STAGE = {"regime": ["two_stage"], "CHUNK_MB": [12, 24, 40, 64, 128, 1024]}
# Whose configurations a case tunes.
TUNED = {
    "packed_matmul": "packed_matmul",
    "packed_matmul_dx": "packed_matmul_dx",
    "binary_matmul": "binary_matmul",
    "scale_gradient": "grid_gradients",
    "row_gradients": "grid_row_gradients",
    "quantize_pack": "quantize_pack",
    "hadamard": "hadamard",
    "dequantize": "dequantize",
    "grid_codes": "grid_codes",
}


def spaces(case: Case) -> list[dict[str, list[Any]]]:
    """The coordinates to combine, a dict per family of configurations."""
    if case.op == "packed_matmul":
        if case.m <= 16:
            wide = {**DECODE, "BLOCK_N": [128], "SPLIT_K": [3, 4, 8], "num_warps": [4]}
            narrow = {**DECODE, "BLOCK_N": [64], "SPLIT_K": [3, 4, 5, 8], "num_warps": [2, 4]}
            return [wide, narrow]
        if case.m <= 512:
            rows = [32, 64] if case.m <= 64 else [64, 128]
            return [
                {
                    **FUSED,
                    "BLOCK_M": rows,
                    "BLOCK_N": [64, 128],
                    "SPLIT_K": [1, 2, 3, 4],
                    "num_warps": [4, 8],
                },
                TWO_STAGE,
            ]
        return [TWO_STAGE]
    if case.op == "packed_matmul_dx":
        fused = {
            "regime": ["fused"],
            "BLOCK_M": [128],
            "BLOCK_N": [32, 64],
            "num_warps": [4, 8],
            "num_stages": [3, 4],
        }
        return [TWO_STAGE, *([fused] if case.m <= 512 else [])]
    if case.op == "binary_matmul":
        shape = {"BLOCK_N": [32, 64], "SPLIT_K": [1, 2, 4], "num_warps": [2, 4, 8], "num_stages": [2, 3]}
        return [{"regime": ["decode"], "BLOCK_M": [8], **shape}]
    if case.op == "scale_gradient" and not case.rank:
        return [
            {
                "form": ["chunked"],
                "BLOCK_N": [32, 64, 128],
                "CHUNK_MB": [24, 48, 96],
                "num_warps": [4, 8],
                "num_stages": [1],
            }
        ]
    if case.op == "scale_gradient":
        blas = {
            "form": ["blas"],
            "BLOCK_N": [32, 64, 128],
            "CHUNK_MB": [24, 48, 96],
            "SPAN": [2, 4, 8],
            "num_warps": [2, 4],
        }
        fused = {
            "form": ["fused"],
            "BLOCK_M": [64],
            "BLOCK_N": [128],
            "BLOCK_K": [128],
            "num_warps": [8],
            "num_stages": [3, 4],
        }
        return [{**blas, "num_stages": [1]}, fused]
    if case.op == "row_gradients":
        chunk = {"SPAN": [4, 8, 16], "CHUNK_MB": [24, 48], "num_stages": [1]}
        return [{"BLOCK_N": [16, 32, 64], "num_warps": [2, 4, 8], **chunk}]
    if case.op == "hadamard":
        return [{"ROWS": [64, 128], "STEP": [64, 128], "num_warps": [4, 8], "num_stages": [1]}]
    return [{"BLOCK_N": [16, 32, 64, 128], "num_warps": [2, 4, 8], "num_stages": [1, 2]}]


def candidates(case: Case, arch: int) -> list[dict[str, Any]]:
    """What the table chooses first, then what it has for this architecture, then the combinations."""
    op = TUNED[case.op]
    out = [dispatch.config(op, case.bits, case.dtype, case.m, case.n, case.k, arch)]
    for entry in dispatch.read_table(dispatch.PACKAGED).get(op, ()):
        if (
            entry.get("arch") in (None, arch)
            and entry.get("bits", case.bits) == case.bits
            and arch != dispatch.INTERPRETER
        ):
            out.append(entry["config"])
    if arch != dispatch.INTERPRETER:
        for space in spaces(case):
            out += [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    return [config for i, config in enumerate(out) if config not in out[:i]]


@functools.lru_cache(maxsize=1)
def _built(case: Case, dry: bool) -> Built:
    return build(case, device_of(dry), 1, frozenset())


def attempt(case: Case, config: dict[str, Any], dry: bool) -> str:
    """In a process of the pool: compile and check one configuration. "" where it is right, else why not."""
    try:
        with dispatch.override(TUNED[case.op], config):
            checked(_built(case, dry), case)
        return ""
    except Exception as error:  # a compiler may raise anything for tile sizes it does not like
        return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def compiled(jobs: list[tuple[Case, dict[str, Any]]], dry: bool, deadline: float) -> dict[int, str]:
    """Number of the job -> "" or why it cannot be used; what did not end in time is missing."""
    found: dict[int, str] = {}
    context = multiprocessing.get_context("spawn")
    workers = 2 if dry else max(1, (os.cpu_count() or 2) - 3)
    pool = ProcessPoolExecutor(workers, mp_context=context)
    waiting = {pool.submit(attempt, case, config, dry): number for number, (case, config) in enumerate(jobs)}
    try:
        for done in as_completed(waiting, timeout=max(1.0, deadline - time.monotonic())):
            found[waiting[done]] = (
                done.result() if done.exception() is None else f"its process died: {done.exception()}"[:200]
            )
    except TimeoutError:
        print(f"compiled {len(found)} of {len(jobs)} in time", flush=True)
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    return found


def timed(
    case: Case, configs: list[dict[str, Any]], device: torch.device, dry: bool, deadline: float
) -> list[tuple[float, dict]]:
    """(microseconds, configuration), best first."""
    made = build(case, device, copies_of(case, dry), frozenset())
    alone, out = Built(calls={"ours": made.calls["ours"]}), []
    for config in configs:
        if time.monotonic() > deadline:
            break
        try:
            with dispatch.override(TUNED[case.op], config):
                out.append((measure(alone, case, device, 1 if dry else 7)["ours"], config))
        except Exception as error:
            print(f"{case.name}: {config}: {error}"[:300], flush=True)
        finally:
            if device.type == "cuda":  # the trial's graph is gone, its counters may be used again
                torch.cuda.synchronize()
                importlib.import_module("lowbit_kernels.counters").drop_counters()
    return sorted(out, key=lambda pair: pair[0])


def entry_of(case: Case, config: dict[str, Any], arch: int) -> dict[str, Any]:
    """A configuration as an entry of the table: for this architecture and the octave of M around the case."""
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[case.dtype]
    low = case.m // 2 + 1 if case.m > 1 else 1
    return {
        "arch": arch,
        "bits": case.bits,
        "dtype": dtype,
        "m": [low, max(low, case.m)],
        "n": [case.n, case.n],
        "k": [case.k, case.k],
        "config": config,
    }


def tune(options: argparse.Namespace) -> int:
    """Most of the time for compiling. Returns the number of cases without a right configuration."""
    dry, began = options.dry_run, time.monotonic()
    device, path = device_of(dry), dispatch.user_cache()
    arch = 0 if dry else dispatch.architecture()
    table = dispatch.read_table(path) if path.is_file() and not dry else {}
    cases = [case for case in (tiny(tuned()) if dry else tuned()) if options.only in case.name]
    jobs = [(case, config) for case in cases for config in candidates(case, arch)]
    found = compiled(jobs, dry, began + 0.7 * options.seconds)
    failures, trials = 0, {}
    print(
        f"{list(found.values()).count('')} of {len(jobs)} right after {time.monotonic() - began:.0f} s",
        flush=True,
    )
    for case in cases:
        mine = [number for number, job in enumerate(jobs) if job[0] == case]
        right = [jobs[number][1] for number in mine if found.get(number) == ""]
        best = timed(case, right, device, dry, began + options.seconds)
        trials[case.name] = {
            "captured": case.small,
            "times": best,
            "refused": [(found[n], jobs[n][1]) for n in mine if found.get(n)],
        }
        if not best:
            failures += 1
            print(f"{case.name}: no configuration worked", flush=True)
            continue
        now = next((spent for spent, config in best if config == jobs[mine[0]][1]), float("nan"))
        print(
            f"{case.name}: {now:.1f} -> {best[0][0]:.1f} us of {len(best)}: {json.dumps(best[0][1])}",
            flush=True,
        )
        if not dry:
            entry, op = entry_of(case, best[0][1], arch), TUNED[case.op]
            kept = [e for e in table.get(op, []) if {**e, "config": None} != {**entry, "config": None}]
            table[op] = [*kept, entry]
            write(path, table)
            if options.out is not None:
                write(Path(options.out), trials)
    return failures
