"""All six commands, one after the other, or a dry run of them at tiny sizes on the CPU.

    python -m benchmarks.first_gpu --dry-run [--out FOLDER]     # about 5 minutes on two cores; a temporary folder by default
    python -m benchmarks.first_gpu --out FOLDER [--only check kernels] [--seconds 520]

Each is a process of its own; one that fails does not keep the next from running.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.first_gpu.command import SECONDS

COMMANDS = ("check", "kernels", "solvers", "sums", "job", "profile")
"""In the order in which one decides about the next."""


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each command (default: %(default)g)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    return parser


def arguments_of(name: str, options: argparse.Namespace, out: Path) -> list[str]:
    """The command line of one command."""
    device = ["--device", "cpu"] if options.dry_run else []
    return [sys.executable, "-m", f"benchmarks.first_gpu.{name}", "--out", str(out), "--seconds", f"{options.seconds:g}", *device]


def state_of(name: str, out: Path) -> str:
    """What a command's result says of itself."""
    path = out / f"{name}.json"
    return json.loads(path.read_text())["state"] if path.exists() else "no result"


def main(argv: list[str] | None = None) -> None:
    parser = parser_of()
    options = parser.parse_args(argv)
    if options.out is None and not options.dry_run:
        parser.error("--out is needed, unless this is a --dry-run")
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder)
        lines = []
        for name in options.only:
            began = time.perf_counter()
            code = subprocess.run(arguments_of(name, options, out), check=False).returncode
            lines.append(f"{name:8} {time.perf_counter() - began:5.0f} s  exit code {code}  {state_of(name, out)}")
            if code != 0 or state_of(name, out) != "done":
                lines[-1] += "  FAILED"
    print("\n".join(["", *lines]))
    sys.exit(1 if any(line.endswith("FAILED") for line in lines) else 0)


if __name__ == "__main__":
    main()
