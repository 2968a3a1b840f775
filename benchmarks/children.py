"""A variant of a benchmark in a process of its own, so that its peak memory is its own and a time limit can end it."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


def run_child(module: str, arguments: list[str], *, timeout: float | None = None) -> dict[str, Any]:
    """`python -m module arguments`: the JSON on the last line that it prints; `{"failed": why}` if it fails or takes too long."""
    began = time.perf_counter()
    done = run_limited([sys.executable, "-m", module, *arguments], timeout=timeout)
    wall = time.perf_counter() - began
    if done.returncode is None:
        return {"failed": f"not done in {timeout:.0f} s", "wall": wall}
    if done.returncode != 0:
        return {"failed": (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1][:500], "wall": wall}
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": wall}


class Done(NamedTuple):
    """A program's end: its exit code, None if it was ended for taking too long, and what it printed."""

    returncode: int | None
    stdout: str
    stderr: str


def run_limited(command: Sequence[str], *, timeout: float | None, cwd: Path | None = None) -> Done:
    """Run a program, and end its whole process group if it takes longer than `timeout` seconds.

    Its output goes to files, and after its end it is waited for ten seconds at most: what hangs on a device may not end, and would
    keep a pipe open.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, cwd=cwd, start_new_session=True)
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(timeout)
        _end_group(child)
        for file in (out, err):
            file.seek(0)
        return Done(code, out.read(), err.read())


def _end_group(child: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(10)


def lines_of(module: str, arguments: Sequence[str], *, timeout: float) -> Iterator[dict[str, Any]]:
    """`python -m module arguments`: every line of JSON as the child prints it, so that what a hanging child had is kept.

    Yields:
        The objects; other lines are left out. The last one is `{"failed": why}` if the child fails or takes longer than `timeout`
        seconds; its process group is then ended.
    """
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_forward_lines, args=(child.stdout, lines), daemon=True).start()
        until = time.monotonic() + timeout
        try:
            while (line := lines.get(timeout=max(0.0, until - time.monotonic()))) is not None:
                with contextlib.suppress(json.JSONDecodeError):
                    yield json.loads(line)
            code = child.wait(max(1.0, until - time.monotonic()))
        except (queue.Empty, subprocess.TimeoutExpired):
            yield {"failed": f"not done in {timeout:.0f} s"}
        else:
            if code != 0:
                errors.seek(0)
                yield {"failed": (errors.read().strip() or f"exit code {code}").splitlines()[-1][:500]}
        finally:
            _end_group(child)


def _forward_lines(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def run_together(module: str, count: int, arguments: list[str], *, timeout: float = 300.0) -> list[dict[str, Any]]:
    """`run_child` of `count` processes at the same time, which also get `--rank`, `--ranks` and `--meet` (the rendezvous file).

    Each computes with one thread. If one fails or takes too long, all are ended, and the program with them.
    """
    from nullspace.artifacts.locks import temporary_folder

    with temporary_folder() as folder, contextlib.ExitStack() as stack:
        processes, outputs = [], []
        for rank in range(count):
            own = ["--rank", str(rank), "--ranks", str(count), "--meet", f"{folder}/meet"]
            files = [stack.enter_context(Path(folder, f"{rank}.{name}").open("w+")) for name in ("out", "err")]
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments, *own],
                stdout=files[0],
                stderr=files[1],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            stack.callback(process.kill)
            processes.append((process, files))
        until = time.monotonic() + timeout
        for rank, (process, (out, err)) in enumerate(processes):
            try:
                code: int | str = process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = f"not done in {timeout:.0f} s"
            if code != 0:
                err.seek(0)
                raise SystemExit(f"{' '.join(arguments)}: rank {rank} of {count}: {code}\n{err.read()[-2000:]}")
            out.seek(0)
            outputs.append(json.loads(out.read().splitlines()[-1]))
    return outputs


def forked(module: str, function: str, arguments: Sequence[Any], *, at_once: int, timeout: float) -> Iterator[tuple[Any, Any]]:
    """`module.function(argument)` of each argument, in a process of its own, forked from one that has imported the module.

    Args:
        module: imported once.
        function: name of a function of it that takes one argument; its result is pickled.
        arguments: one call each.
        at_once: calls at the same time, of one thread each.
        timeout: seconds a call.

    Yields:
        (argument, result), in the order in which the calls end; `{"failed": why}` if one ends its process or takes too long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    left, running = list(reversed(arguments)), list[tuple[Any, Any, Any, float]]()
    while left or running:
        while left and len(running) < at_once:
            argument, (here, there) = left.pop(), context.Pipe(duplex=False)
            process = context.Process(target=_call, args=(module, function, argument, there), daemon=True)
            process.start()
            there.close()
            running.append((argument, process, here, time.monotonic() + timeout))
        multiprocessing.connection.wait([here for _, _, here, _ in running], timeout=1.0)
        for each in list(running):
            argument, process, here, until = each
            late = time.monotonic() > until
            if not here.poll() and not late:
                continue
            running.remove(each)
            try:
                result = here.recv() if here.poll() else {"failed": f"not done in {timeout:g} s"}
            except EOFError:
                process.join()
                result = {"failed": f"the process ended with {process.exitcode}"}
            process.kill()
            process.join()
            yield argument, result


def _call(module: str, function: str, argument: Any, there: Any) -> None:
    """In the child: nothing is printed."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        there.send(getattr(importlib.import_module(module), function)(argument))


def take_turns(module: str, variants: Sequence[str], rounds: int, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Every variant once a round, so that a slow period of the machine affects all; returns each run's output and round."""
    runs: list[dict[str, Any]] = []
    for number in range(rounds):
        for variant in variants:
            done = run_child(module, ["--run", variant, *arguments])
            if "failed" in done:
                raise SystemExit(f"{variant}: {done['failed']}")
            runs.append({"round": number, **done})
            print(f"round {number}  {variant:10} {done['seconds']:7.1f} s  peak {done['peak_gb']:.2f} GB", flush=True)
    return runs


def show_summary(summary: Mapping[str, Mapping[str, float]]) -> None:
    """Every variant against the bare forward pass."""
    print("\n" + "\n".join(f"{v:10} {s['time_over_forward']:.2f} x   {s['gb_above_forward']:+.2f} GB" for v, s in summary.items()))


def seconds_since_start() -> float:
    """How long this process has been running (Linux), to a hundredth of a second."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def peak_bytes() -> int:
    """Peak resident memory of this process (Linux). `ru_maxrss` would start with that of its parent."""
    return _status("VmHWM")


def anonymous_bytes() -> int:
    """Memory of this process that belongs to no file (Linux)."""
    return _status("RssAnon")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


class PeakMemory:
    """The largest `anonymous_bytes` while it is open, looked at every few milliseconds: `bytes`, above what there was before."""

    def __enter__(self) -> PeakMemory:
        self._before = self._top = anonymous_bytes()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._top = max(self._top, anonymous_bytes())

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._watcher.join()

    @property
    def bytes(self) -> int:
        return self._top - self._before
