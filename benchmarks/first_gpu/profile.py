"""One launch of the kernel, looked into: what the L2 cache, main memory and the tensor cores do while it runs.

    python -m benchmarks.first_gpu.profile --out FOLDER     # about 2 minutes; writes profile.json

With Nsight Compute (`ncu` on the path, counters readable) one launch at d = 14336 and 16k tokens is profiled, its sections whole:
sectors from L2 and how many it had, bytes from main memory, cycles of the tensor pipe, stalls. Then `torch.profiler` over ten
updates of `Covariance`: the time of each kernel and of the gaps between them. What could not be measured is named.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.children import lines_of, run_limited
from benchmarks.first_gpu.command import Command, options_of

ANSWERS = [
    "does the L2 cache bind the kernel, or main memory, or neither?",
    "how long is the tensor pipe busy?",
    "what else is launched for an update, and where are the gaps?",
]
SIZES = {"cuda": {"d": 14336, "tokens": 16384}, "cpu": {"d": 40, "tokens": 48}}
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "LaunchStats", "Occupancy")
# What is printed; the result has everything. Names differ between versions: parts of them.
SHOWN = (
    "gpu__time_duration.sum",
    "lts__t_sectors.sum",
    "lts__t_sector_hit_rate",
    "lts__throughput.avg.pct",
    "dram__bytes_read.sum",
    "dram__throughput.avg.pct",
    "pipe_tensor",
    "sm__throughput.avg.pct",
    "launch__registers_per_thread",
)
NCU_SECONDS = 180.0


def launch(device: str, times: int) -> None:
    """The kernel alone, some times; the first launch compiles."""
    import torch

    from benchmarks.first_gpu.inputs import draw
    from nullspace import csrc_triton
    from nullspace.moments.triangle import PANEL_ROWS, LowerTriangle

    where, sizes = torch.device(device), SIZES[device]
    x, triangle = draw(sizes["tokens"], sizes["d"], where), LowerTriangle(sizes["d"], device=where)
    for _ in range(times):
        csrc_triton.syrk_accumulate(triangle.packed, x, panel_rows=PANEL_ROWS)
    if where.type == "cuda":
        torch.cuda.synchronize()


def by_ncu(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The second launch under Nsight Compute: its metrics by name, or why there are none."""
    program = [sys.executable, "-m", __spec__.name, "--out", str(options.out), "--device", options.device, "--run", "launch"]
    sections = [text for section in SECTIONS for text in ("--section", section)]
    how = ["--clock-control", "none", "--kernel-name", "regex:syrk", "--launch-skip", "1", "--launch-count", "1"]
    done = run_limited(["ncu", "--csv", "--page", "raw", *how, *sections, *program], timeout=seconds)
    if done.returncode is None:
        return {"failed": f"not done in {seconds:.0f} s"}
    metrics = metrics_of(done.stdout)
    return {"metrics": metrics} if metrics else {"failed": (done.stdout + done.stderr).strip()[-500:] or "no metrics"}


def metrics_of(text: str) -> dict[str, str]:
    """Name → value with its unit, of the last kernel in Nsight Compute's raw page as CSV: a line of names, one of units, values."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None or len(lines) < start + 3:
        return {}
    names, units, *rows = csv.reader(lines[start:])
    return {name: f"{value} {unit}".strip() for name, unit, value in zip(names, units, rows[-1], strict=False) if value}


def by_profiler(device: str) -> Iterator[dict[str, Any]]:
    """Updates of `Covariance` under `torch.profiler`: each kernel's time, and how much of the whole none of them ran."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.first_gpu.inputs import draw, new_covariance
    from benchmarks.first_gpu.timing import timed

    where, sizes = torch.device(device), SIZES[device]
    x, covariance = draw(sizes["tokens"], sizes["d"], where), new_covariance(sizes["d"], where)
    updates = 10 if where.type == "cuda" else 1
    for _ in range(2):
        covariance.update(x)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if where.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        seconds, _ = timed(lambda: [covariance.update(x) for _ in range(updates)], where)
    events = profiler.key_averages()
    # Names of both attributes have changed over versions.
    own = {event.key: float(getattr(event, "self_device_time_total", 0.0)) for event in events}
    total = sum(own.values())
    yield {"updates": updates, "seconds": seconds, "kernels_s": total / 1e6, "not in kernels": 1 - total / 1e6 / seconds}
    for event in sorted(events, key=lambda event: -own[event.key])[:12]:
        if own[event.key] > 0:
            yield {"kernel": event.key[:80], "calls": event.count, "ms a call": own[event.key] / 1e3 / event.count}


def run(command: Command) -> None:
    """Nsight Compute where it is, then the profiler."""
    options = command.options
    if command.dry:
        command.leave_out("sectors of L2, bytes of main memory, cycles of the tensor pipe", "a dry run")
    elif shutil.which("ncu") is None:
        command.leave_out("sectors of L2, bytes of main memory, cycles of the tensor pipe", "ncu is not on the path")
    else:
        row = by_ncu(options, min(NCU_SECONDS, command.left))
        shown = {n: v for n, v in row.get("metrics", {}).items() if any(part in n for part in SHOWN)}
        command.add(what="ncu", **shown, **row)
        if "failed" in row:
            command.leave_out("sectors of L2, bytes of main memory, cycles of the tensor pipe", "ncu read no counters here")
    arguments = ["--out", str(options.out), "--device", options.device, "--run", "profiler"]
    for row in lines_of(__spec__.name, arguments, timeout=max(10.0, min(120.0, command.left))):
        command.add(what="torch.profiler", **row)


def main(argv: list[str] | None = None) -> None:
    options = options_of("profile", __doc__, argv)
    if options.run == "launch":
        launch(options.device, 2)
        return
    if options.run:
        for row in by_profiler(options.device):
            print(json.dumps(row), flush=True)
        return
    with Command("profile", ANSWERS, options) as command:
        run(command)


if __name__ == "__main__":
    main()
