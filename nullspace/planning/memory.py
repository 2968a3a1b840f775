"""How much memory can still be had."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch


def free_on_device(device: torch.device) -> int:
    """Bytes that this process can still fill: free ones, and those that PyTorch holds and does not use."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    room = free + torch.cuda.memory_reserved(device) - allocated
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    return int(min(room, fraction * total - allocated))


def free_on_host() -> int | None:
    """Bytes that can be had without swapping, of the machine and of the control group; None if the system does not say."""
    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        room = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Files that were read count as used, and go when the memory is wanted.
        found.append(room + sum(int(stat.get(name, 0)) for name in ("active_file", "inactive_file")))
    if not found:
        with contextlib.suppress(OSError, ValueError):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return max(0, min(found)) if found else None
