"""Peak memory of a stage, in GB: the GPU's allocator when there is one, the process's resident set otherwise.

Linux keeps a resettable high-water mark (VmHWM, reset by writing 5 to clear_refs), so each stage gets its own
peak; elsewhere the peak of the whole process is what can be told.
"""

import ctypes
from pathlib import Path

import psutil
import torch


def reset_peak(device: torch.device) -> None:
    """Start a new measurement."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux, or not allowed: peak_gb then reports the whole process


def peak_gb(device: torch.device) -> float:
    """Peak since `reset_peak`, in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows, where psutil has the peak
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 1e9
    unit = 1 if psutil.MACOS else 1024  # ru_maxrss is bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def release_freed() -> None:
    """Give memory that was freed back to the system (glibc's malloc_trim; nothing elsewhere).

    Packing allocates a few fp32 chunks per layer between tensors that stay. glibc keeps what is freed in
    between: quantizing a 1 GB checkpoint then peaks 0.69 GB over its packed size, and 0.1 GB when this is
    called after every layer.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # not glibc
