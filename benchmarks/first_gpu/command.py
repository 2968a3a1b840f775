"""What the six commands share: options, a clock, a result file that is whole after every row, and a verdict at the end."""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from benchmarks.children import seconds_since_start
from benchmarks.environment import write_result

SECONDS = 520.0
"""Of a command by default: under nine minutes with its start."""


class Goal(NamedTuple):
    """A figure that is wanted.

    Attributes:
        what: the figure, with its unit.
        limit: what is wanted of it.
        least: whether `limit` is the least that is wanted; else it is the most.
        command: the command that measures it.
    """

    what: str
    limit: float
    least: bool
    command: str

    def verdict(self, value: float | None) -> str:
        """`"met"`, `"missed"` or `"not measured"`."""
        if value is None:
            return "not measured"
        return "met" if (value >= self.limit if self.least else value <= self.limit) else "missed"


GOALS = {
    "checks": Goal("checks that failed", 0, False, "check"),
    **{
        f"kernel {d}": Goal(
            f"kernel over cuBLAS bf16 mm, d = {d}, 16k tokens, the fastest variant with δ ≤ 3e-8, ×", 1.5, True, "kernels"
        )
        for d in (4096, 14336)
    },
    "resolution": Goal("resolution δ of the default variant", 3e-8, False, "kernels"),
    **{f"solver {d}": Goal(f"bottom 128 of {d} against torch.linalg.eigh, ×", 20, True, "solvers") for d in (11008, 14336)},
    "residual": Goal("largest residual ‖CU − UΛ‖ / ‖C‖ and orthogonality ‖UᵀU − I‖", 1e-12, False, "solvers"),
    "excess": Goal("largest excess leak against eigh", 1e-9, False, "solvers"),
    "job": Goal("Llama-3-8B shape, whole job over the bare forward pass, ×", 2, False, "job"),
    "peak": Goal("Llama-3-8B shape, peak above the weights, GB", 5, False, "job"),
    "capped": Goal("70B shape, two blocks, down_proj included: reserved, GB", 24, False, "job"),
}


def options_of(name: str, doc: str | None, argv: list[str] | None = None, *, more: Any = None) -> argparse.Namespace:
    """The command line of a command, and the environment that its device wants.

    Args:
        name: of the command.
        doc: its module's docstring.
        argv: the arguments; those of the process by default.
        more: adds its own options to the parser.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.first_gpu.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the result, made if need be")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="after which nothing is begun any more (default: %(default)g)"
    )
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a dry run at tiny sizes, which judges nothing"
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)  # what a child process does
    if more is not None:
        more(parser)
    options = parser.parse_args(argv)
    if options.seconds <= 0:
        parser.error("--seconds must be positive")
    if options.device == "cpu":  # before Triton is imported, and before CUDA is asked for
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return options


class Command:
    """A context manager: prints what the command answers, collects rows, and prints the verdict.

    The result, `<out>/<name>.json`, is written after every row, so that a run that is cut leaves what it had. Its last key `state`
    says whether the command came to its end.

    Args:
        name: of the command and its file.
        answers: what it answers, a line each.
        options: of `options_of`.
    """

    def __init__(self, name: str, answers: list[str], options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.dry = options.device == "cpu"
        self._began = time.perf_counter()
        self._measured: dict[str, float] = {}
        self._content: dict[str, Any] = {
            "command": name,
            "device": options.device,
            "dry_run": self.dry,
            "answers": answers,
            "startup": {"python and imports": seconds_since_start()},
            "rows": [],
            "left_out": [],
            "goals": {},
            "state": "begun",
        }

    def __enter__(self) -> Command:
        import torch

        if not self.dry and not torch.cuda.is_available():
            raise SystemExit("there is no CUDA device here: --device cpu for a dry run at tiny sizes")
        print(f"{self.name}: " + "\n  ".join(["what it answers", *self._content["answers"]]), flush=True)
        self._content["startup"] |= start_device(self.options.device)
        self._write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._content["state"] = "done" if error is None else f"ended by {kind.__name__ if kind else ''}: {error}"[:500]
        self._content["seconds"] = time.perf_counter() - self._began
        for key, goal in GOALS.items():
            if goal.command == self.name:
                value = self._measured.get(key)
                known = None if value is None or math.isinf(value) else value
                self._content["goals"][key] = {**goal._asdict(), "value": known, "verdict": self._verdict(goal, value)}
        path = self._write()
        print("\n".join([*self._summary(), f"wrote {path} after {self._content['seconds']:.0f} s"]), flush=True)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return self._content["rows"]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Those that say so."""
        return [row for row in self.rows if "failed" in row]

    def add(self, **row: Any) -> dict[str, Any]:
        """Keep a row, write the file, print the row."""
        self.rows.append(row)
        self._write()
        print("  ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
        return row

    def leave_out(self, what: str, why: str) -> None:
        """Keep what is not measured, and why."""
        self._content["left_out"].append(f"{what}: {why}")
        print(f"left out: {what}: {why}", flush=True)

    @property
    def left(self) -> float:
        """Seconds until nothing is begun any more."""
        return self.options.seconds - (time.perf_counter() - self._began)

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; if not, `what` is left out."""
        if self.left >= seconds:
            return True
        self.leave_out(what, f"takes about {seconds:.0f} s, and {max(self.left, 0):.0f} s were left")
        return False

    def measure(self, key: str, value: float) -> None:
        """Keep the figure of a goal; infinity, if there can be none because the run failed."""
        self._measured[key] = value

    def _verdict(self, goal: Goal, value: float | None) -> str:
        return "not judged: a dry run" if self.dry and goal.command != "check" else goal.verdict(value)

    def _summary(self) -> list[str]:
        lines = [f"{self.name}: {self._content['state']}"]
        for goal in self._content["goals"].values():
            value = "–" if goal["value"] is None else f"{goal['value']:.3g}"
            lines.append(f"  {goal['what']}: {value} (wanted {'≥' if goal['least'] else '≤'} {goal['limit']:g}): {goal['verdict']}")
        return [*lines, *(f"  left out: {text}" for text in self._content["left_out"])]

    def _write(self) -> Path:
        return write_result(self.name, self._content, self.options.out)


def start_device(device: str) -> dict[str, float]:
    """Seconds until the device computes, and until cuBLAS and cuSOLVER have their handles; nothing on a CPU."""
    import torch

    if device == "cpu":
        return {}
    seconds: dict[str, float] = {}

    def step(name: str, run: Any) -> None:
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - began

    step("context", lambda: torch.zeros(1, device=device))
    half, double = (torch.randn(256, 256, device=device).to(dtype) for dtype in (torch.bfloat16, torch.float64))
    step("cuBLAS", lambda: (half.T @ half, double.T @ double))
    step("cuSOLVER", lambda: torch.linalg.eigh(torch.linalg.cholesky(double.T @ double + torch.eye(256, device=device))))
    return seconds


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.3e}"
    if isinstance(value, list) and len(value) > 4:
        return f"[{len(value)} values]"
    return str(value)
