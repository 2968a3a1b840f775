"""Processes that work together: a group of them is started once and runs many checks, one after the other."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import multiprocessing
import multiprocessing.forkserver
import os
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers

# The server that all processes are forked from imports these once for all of them.
from models import tiny
from nullspace.cli import app
from nullspace.integrations.peft import inject_adapters
from patience import wait_for

# The group's own timeout. A test never waits for it: `patience` ends a group that stands still earlier.
GROUP_SECONDS = 1800
Check = Callable[[int, int, Path], None]
# For the server that all processes are forked from: classes that transformers would import once in each of them.
PRELOADED = (transformers.LlamaForCausalLM, tiny, peft.PeftModel, inject_adapters, app)


def forking() -> BaseContext:
    """Of processes that are forked from one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["processes"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        multiprocessing.forkserver.ensure_running()  # it looks for them nowhere else
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


class Checks:
    """Functions of a file that all processes of a group run, `(rank, count, folder that is theirs together)`, by the group's size.

    Use as a decorator: `@check(2, 3)`.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._names: dict[int, list[str]] = {}
        self._said: dict[int, dict[str, list[str]]] = {}

    def __call__(self, *counts: int) -> Callable[[Check], Check]:
        def listed(function: Check) -> Check:
            for count in counts:
                self._names.setdefault(count, []).append(function.__name__)
            return function

        return listed

    @property
    def all(self) -> list[tuple[int, str]]:
        """Every check with the size of its group."""
        return [(count, name) for count, names in self._names.items() for name in names]

    def report(self, count: int, name: str, temporary: pytest.TempPathFactory) -> None:
        """Fail if a check did; a group runs all of its checks when the first of them is asked for."""
        if count not in self._said:
            self._said[count] = outcomes(self._path, count, self._names[count], temporary.mktemp("together") / str(count))
        found = self._said[count]
        assert name in found, "it did not come to an end"
        assert not any(found[name]), "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(found[name]) if text)


def outcomes(path: str | Path, count: int, checks: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """Run functions `check(rank, count, folder)` of a file in `count` processes; of each, what went wrong, process by process.

    A check that did not get to its end is not in the answer.
    """
    context: Any = forking()
    folder.mkdir()
    processes = [context.Process(target=_run, args=(str(path), rank, count, list(checks), folder)) for rank in range(count)]
    for process in processes:
        process.start()
    try:
        with contextlib.suppress(AssertionError):  # what has not come to its end is missing below
            wait_for(lambda: not any(process.is_alive() for process in processes), [process.pid for process in processes])
    finally:
        for process in processes:
            process.kill()
            process.join()
    files = [folder / f"{rank}.json" for rank in range(count)]
    said = [json.loads(file.read_text()) if file.is_file() else {} for file in files]
    return {check: [each[check] for each in said] for check in checks if all(check in each for each in said)}


def run_nullspace(*arguments: str) -> None:
    """What a launcher starts in each of its workers, `python -m nullspace`, in a process that runs already."""
    torch.set_num_threads(1)
    try:
        app(list(arguments))
    except SystemExit as done:
        if done.code:
            raise


def _run(path: str, rank: int, count: int, checks: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    module = _load(path)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=datetime.timedelta(seconds=GROUP_SECONDS)
    )
    said: dict[str, str] = {}
    for check in checks:
        own = folder / check
        own.mkdir(exist_ok=True)
        try:
            getattr(module, check)(rank, count, own)
            said[check] = ""
        except BaseException:
            said[check] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(said))
    if dist.is_initialized():
        dist.destroy_process_group()


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("checks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
