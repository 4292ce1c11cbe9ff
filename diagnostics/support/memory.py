"""Peak memory of a block, above what was in use before it; and free memory."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Peak:
    """``bytes``: the peak above the start, once the block has ended; None where it cannot be measured."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the block's peak: of the allocator on CUDA, of resident memory on a Linux CPU; None elsewhere.

    On the CPU, pages that the process already holds are not counted. Freed memory is returned to the system first, but
    fragments keep some of it, so the figure is a lower bound.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
    elif device.type == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # has Linux forget the peak so far
        except OSError:
            yield peak
            return
        before = resident("VmRSS")
        yield peak
        peak.bytes = max(0, resident("VmHWM") - before)
    else:
        yield peak


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, as CUDA or Linux reports; None elsewhere."""
    if device.type == "cuda":
        # Memory that the allocator holds and does not use is free, too.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def resident(field: str) -> int:
    """Bytes of one field of this process's status, such as ``VmRSS``; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
