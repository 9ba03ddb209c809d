"""Where the time of our ops goes: device time by kernel, and what Python takes to launch a call."""

import argparse
import time

import torch
from bench_build import build
from bench_time import chosen, device_of

CALLS = 5


def profile(options: argparse.Namespace) -> int:
    """Prints, per case, host microseconds per call and the kernels by device time. Returns 0."""
    device = device_of(options.dry_run)
    for case in chosen(options.set, options.dry_run):
        if options.only not in case.name:
            continue
        call = build(case, device, 1, frozenset()).calls["ours"][0]
        wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
        for _ in range(3):
            call()
        wait()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        host = (time.perf_counter() - began) * 1e6 / CALLS
        wait()
        print(f"{case.name}: the host takes {host:.0f} us per call", flush=True)
        activities = [
            torch.profiler.ProfilerActivity.CUDA
            if device.type == "cuda"
            else torch.profiler.ProfilerActivity.CPU
        ]
        with torch.profiler.profile(activities=activities) as seen:
            for _ in range(CALLS):
                call()
            wait()
        rows = [
            (event.self_device_time_total / CALLS, event.count / CALLS, event.key)
            for event in seen.key_averages()
        ]
        for spent, count, name in sorted(rows, reverse=True)[:8]:
            if spent > 0:
                print(f"    {spent:9.1f} us in {count:g} x {name[:90]}", flush=True)
    return 0
