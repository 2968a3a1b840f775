"""Free memory of the host."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# Of pinned memory that is carved up: the more, the smaller the part that is rounding.
TENSORS_A_SLAB = 8


def power_of_two(size: int) -> int:
    """What PyTorch's allocator of pinned memory takes for `size` bytes."""
    return 1 << max(size - 1, 0).bit_length()


def slab_size(size: int, left: int) -> int:
    """Bytes of the next piece of pinned memory that is carved up for tensors of `size` bytes, of `left` bytes in all."""
    return power_of_two(max(size, min(left, TENSORS_A_SLAB * size)))


def pinned_bytes(size: int, count: int) -> int:
    """Bytes of pinned memory for `count` tensors of `size` bytes."""
    total, left = 0, size * count
    while left > 0:
        slab = slab_size(size, left)
        total, left = total + slab, left - slab // size * size
    return total


def free_on_host() -> int | None:
    """Bytes available without swapping, in the machine and in the control group; None if the system does not report them."""
    limits = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        room = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached files count as used, and are dropped when memory is needed.
        limits.append(room + sum(int(stat.get(name, 0)) for name in ("active_file", "inactive_file")))
    if not limits:
        with contextlib.suppress(OSError, ValueError):
            limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return max(0, min(limits)) if limits else None
