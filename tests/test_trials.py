"""Commands that are killed or ended at random moments and run again, and pairs of runs that write to one place.

`NULLSPACE_TRIALS=all` makes 120 kills and 200 pairs; by default there are as many as a suite has time for.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from models import random_spaces
from nullspace import NullSpaces
from patience import wait_for
from processes import forking

pytestmark = pytest.mark.processes

ALL = os.environ.get("NULLSPACE_TRIALS") == "all"
KILLS, PAIRED_SAVES, PAIRED_INITS = (120, 150, 50) if ALL else (7, 12, 1)
SMALL = ["--data", "../data.txt", "--samples", "6", "--length", "64", "--batch-size", "2"]
LAYERWISE = ["--strategy", "layerwise", "--hidden-states", "disk"]
COMMANDS = {
    "compute": ["compute", "../model", *SMALL, "--rank", "8", *LAYERWISE],
    "covariances": ["covariances", "../model", *SMALL, *LAYERWISE],
    "merge": ["merge", "../covariances", "../covariances"],
    "init": ["init", "../model", *SMALL, "--rank", "8", "--method", "corda-kpm", "--offload"],
    "export": ["export", "../init/adapter", "--initial", "../init"],
    "filter": ["filter", "../model", "../model", *("--task", "../covariances", "--keep", "../covariances", "--strength", "1")],
    "report": ["report", "--covariances", "../covariances"],
}


def run_command(arguments: list[str], folder: Path, name: str) -> None:
    """In a process of its own, with `folder/work` as working directory and temporary files in `folder/temporary`."""
    torch.set_num_threads(1)
    tempfile.tempdir = str(folder / "temporary")
    os.chdir(folder / "work")
    said = os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    from nullspace.cli import app

    app([*arguments, "--out", "out"])


class Place(NamedTuple):
    """Where all trials take place, one after the other: paths are in what is written, and results are compared byte by byte."""

    folder: Path
    results: dict[str, dict[str, bytes]]
    seconds: dict[str, float]

    def start(self, command: str, name: str = "said") -> BaseProcess:
        context: Any = forking()
        process = context.Process(target=run_command, args=(COMMANDS[command], self.folder, name))
        process.start()
        return process

    def run(self, command: str) -> int:
        process = self.start(command)
        wait_for_all([process])
        return process.exitcode

    def said(self, name: str = "said") -> str:
        return " ".join((self.folder / f"{name}.txt").read_text().split())

    def clear(self) -> None:
        for name in ("work", "temporary"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()

    def left(self) -> tuple[list[str], list[str]]:
        """What lies in the working directory, and among temporary files."""
        return sorted(os.listdir(self.folder / "work")), sorted(os.listdir(self.folder / "temporary"))


def wait_for_all(processes: list[BaseProcess]) -> None:
    wait_for(lambda: not any(process.is_alive() for process in processes), [process.pid or 0 for process in processes])


def tree(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted([out, *out.rglob("*")]) if p.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, prose: list[str]) -> Place:
    """Every command has run once, undisturbed; what some have written is what others read."""
    found = Place(tmp_path_factory.mktemp("trials"), {}, {})
    (found.folder / "data.txt").write_text("\n\n".join(prose[:3]))
    (found.folder / "model").symlink_to(tiny_checkpoint)
    for command in COMMANDS:
        found.clear()
        began = time.perf_counter()
        assert found.run(command) == 0, found.said()
        found.seconds[command] = time.perf_counter() - began
        found.results[command] = tree(found.folder / "work" / "out")
        assert found.left() == (["out"], [])
        if command in ("covariances", "init"):
            shutil.copytree(found.folder / "work" / "out", found.folder / command)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_killed_or_ended_at_any_moment_ends_the_same_when_it_runs_again(place: Place, command: str) -> None:
    chance = random.Random(command)
    for trial in range(KILLS // len(COMMANDS)):
        place.clear()
        process = place.start(command)
        time.sleep(chance.uniform(0.0, 0.9 * place.seconds[command]))
        how = signal.SIGTERM if trial % 4 == 3 else signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):  # it has ended before
            os.kill(process.pid or 0, how)
        process.join()
        work, temporary = place.left()
        if process.exitcode == 128 + signal.SIGTERM:
            assert "ended by SIGTERM" in place.said()
            assert ("goes on behind" in place.said()) == ("out.checkpoint" in work)
            assert set(work) <= {"out", "out.checkpoint"}
            assert not temporary
        if "out" not in work:
            assert place.run(command) == 0, place.said()
            assert place.left() == (["out"], [])
        assert tree(place.folder / "work" / "out") == place.results[command], (trial, how, place.said())


def test_of_two_inits_one_wins_whole_and_the_other_is_refused_by_name(place: Place) -> None:
    chance = random.Random(0)
    for trial in range(PAIRED_INITS):
        place.clear()
        processes = [place.start("init", "first")]
        time.sleep(chance.uniform(0.0, 0.5 * place.seconds["init"]))
        processes.append(place.start("init", "second"))
        wait_for_all(processes)
        said = [place.said("first"), place.said("second")]
        assert sorted(process.exitcode or 0 for process in processes) == [0, 2], (trial, said)
        refused = said[processes[0].exitcode == 0]
        assert "/out is being written by another run (process " in refused or "out exists" in refused, (trial, refused)
        assert place.left() == (["out"], [])
        assert tree(place.folder / "work" / "out") == place.results["init"]


def save_at_once(number: int, barrier: Any, folder: Path, trials: int) -> None:
    """In one of two processes: of each trial, what became of it."""
    torch.set_num_threads(1)
    spaces = random_spaces(number, sites=6)
    for trial in range(trials):
        barrier.wait()
        try:
            spaces.save(folder / str(trial) / "out")
            said = "saved"
        except FileExistsError as error:
            said = str(error)
        (folder / f"{trial} {number}.txt").write_text(said)


def test_of_two_saves_one_wins_whole_and_the_other_is_refused_by_name(tmp_path: Path) -> None:
    context: Any = forking()
    barrier = context.Barrier(2)
    processes = [context.Process(target=save_at_once, args=(number, barrier, tmp_path, PAIRED_SAVES)) for number in range(2)]
    for process in processes:
        process.start()
    wait_for_all(processes)
    spaces = [random_spaces(number, sites=6) for number in range(2)]
    for trial in range(PAIRED_SAVES):
        said = [(tmp_path / f"{trial} {number}.txt").read_text() for number in range(2)]
        winner = said.index("saved")
        assert said[1 - winner].startswith(str(tmp_path / str(trial) / "out")), said
        found = NullSpaces.load(tmp_path / str(trial) / "out")
        assert all(torch.equal(found[name].basis, spaces[winner][name].basis) for name in found)
        assert os.listdir(tmp_path / str(trial)) == ["out"]
