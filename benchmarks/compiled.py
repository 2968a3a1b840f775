"""What every supported Triton makes of the kernels, for every capability: nothing is run, and no GPU is needed.

    python -m benchmarks.compiled            # a quarter of an hour on one core; writes benchmarks/results/compiled.json

Each version is installed into `build/triton/<version>` (600 to 900 MB each) and used for `tests/csrc_triton/compiled.py` alone. The
result holds, by version, kernel and name, what that program reports: registers, shared memory, stack, and what the innermost loops
hold; or an error. `tests/csrc_triton/test_compiled.py` reads the claims off it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, write_result

ROOT = Path(__file__).parent.parent
VERSIONS = ("3.5.1", "3.6.0", "3.7.0", "3.8.0", "3.9.0")
CAPABILITIES = (80, 86, 89, 90, 100, 120)


def install(version: str, folder: Path) -> Path:
    """Triton of a version in a folder of its own, and nothing else."""
    target = folder / version
    if not (target / "triton").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(target), f"triton=={version}"], check=True)
    return target


def compile_all(triton: Path, capabilities: list[int]) -> dict[str, Any]:
    """What `tests/csrc_triton/compiled.py` prints with the Triton in a folder."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(triton), str(ROOT)]), "TRITON_CACHE_DIR": str(triton / "cache")}
    script = ROOT / "tests" / "csrc_triton" / "compiled.py"
    done = subprocess.run(
        [sys.executable, script, *map(str, capabilities)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def summary(result: dict[str, Any]) -> str:
    """A line a cell that failed, and the registers and loop of the 16-bit kernels."""
    lines = []
    for version, kernels in result["versions"].items():
        for kernel, cells in kernels.items():
            for name, facts in cells.items():
                if "error" in facts:
                    lines.append(f"{version} {kernel:13} {name:32} {facts['error'][:90]}")
                elif kernel in ("syrk", "gluon", "grouped") and name.startswith("bf16"):
                    counts = ", ".join(f"{key} {value}" for key, value in facts["loop"].items())
                    lines.append(
                        f"{version} {kernel:13} {name:32} {facts['registers']:4} registers, stack {facts['stack']}: {counts}"
                    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--capabilities", nargs="+", type=int, default=CAPABILITIES)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "triton", help="where the versions are installed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"versions": {}}
    for version in arguments.versions:
        kernels = compile_all(install(version, arguments.folder), arguments.capabilities)
        assert kernels.pop("triton") == version
        result["versions"][version] = kernels
        write_result("compiled", result, arguments.out)
        print(summary({"versions": {version: kernels}}), flush=True)


if __name__ == "__main__":
    main()
