"""Peak memory of a stage, in GB: the GPU's allocator when there is one, the process's resident set otherwise;
and what is free.

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


def free_ram() -> int:
    """Bytes that a process may still take on this machine: what the system says is available, and the limit
    of its cgroup.
    """
    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = Path(limit).read_text().strip(), int(Path(used).read_text())
        except (OSError, ValueError):
            continue
        if most.isdecimal() and int(most) < 1 << 60:
            # Cached files count as used and are given back under pressure.
            free = min(free, max(0, int(most) - now) + _cached_files(Path(used).parent))
    return free


def _cached_files(folder: Path) -> int:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(stat.get("inactive_file", stat.get("total_inactive_file", 0))) + int(
        stat.get("active_file", stat.get("total_active_file", 0))
    )


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
