"""The environment of a result: hardware, versions, commit."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "scipy", "transformers", "peft", "triton")


@functools.cache
def environment() -> dict[str, Any]:
    """Hardware, versions and commit of this run."""
    import torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "vector_unit": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
        # A copy of the tree without its history gets its commit from the environment.
        "commit": _git("rev-parse", "HEAD") or os.environ.get("NULLSPACE_COMMIT", ""),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"))
        if _git("rev-parse", "HEAD")
        else None,
    }


def write_result(name: str, content: dict[str, Any], folder: Path = RESULTS) -> Path:
    """`<folder>/<name>.json`, whole at any time: a program that is ended while it writes leaves the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / f"{name}.json", folder / f".{name}.json"
    part.write_text(json.dumps({"environment": environment(), **content}, indent=1) + "\n")
    part.replace(path)
    return path


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return done.stdout.strip()
