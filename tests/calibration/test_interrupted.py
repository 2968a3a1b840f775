"""A process that dies or stalls: the others end with its name, what is finished stays, and any number of processes goes on."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from typer.testing import CliRunner

from models import random_batches
from nullspace import NullSpaces, compute_null_spaces, stream_covariances
from nullspace.cli import app
from nullspace.distributed import job
from patience import finish, slowness, wait_for
from processes import GROUP_SECONDS, forking
from reference import excess_over

pytestmark = pytest.mark.processes

# How many calibrate until one is killed, and how many go on.
TRIALS = [(2, 1), (1, 2), (2, 1), (2, 2), (3, 2), (2, 3)]
STEPS = r"its preparations|the forward pass( of '[^']+')?|(the reduction of|the work on) '[^']+'"
LAST_STEP = rf"\((which never began|last seen in ({STEPS}))\)"


def deep_model() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=211, num_hidden_layers=8, **shape)).eval()


def batches() -> list[dict[str, torch.Tensor]]:
    return random_batches(13, 4, 64)


def compute(kept: Path | None, strategy: str, **options: Any) -> NullSpaces:
    return compute_null_spaces(
        deep_model(), batches(), rank=8, precision="fp64", strategy=strategy, checkpoint=kept, progress=False, **options
    )


def calibrate(rank: int, count: int, folder: Path, strategy: str, seconds: float) -> None:
    """One process: what became of it is in `folder/rank.json`."""
    torch.set_num_threads(1)
    job.ANSWER_TIME = datetime.timedelta(seconds=1)
    group, own = folder / f"group-of-{count}", folder / f"{rank}.json"
    if count > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{group}", rank=rank, world_size=count, timeout=datetime.timedelta(seconds=seconds)
        )
    (folder / f"{rank}.begun").touch()
    began = time.perf_counter()
    try:
        found = compute(folder / "kept", strategy)
        said = {"sites": len(found.sites)}
        if rank == 0:
            found.save(folder / "spaces", overwrite=True)
    except BaseException as error:
        said = {"kind": type(error).__name__, "error": str(error)}
    part = own.with_suffix(".part")
    part.write_text(json.dumps({**said, "seconds": time.perf_counter() - began}))
    part.rename(own)
    os._exit(0)  # no destructor of a group that has lost a member is to be waited for


@contextlib.contextmanager
def calibrating(count: int, folder: Path, strategy: str, *, seconds: float = GROUP_SECONDS) -> Iterator[list[BaseProcess]]:
    """Inside, all processes have begun to compute."""
    context: Any = forking()
    for old in (*folder.glob("*.begun"), *folder.glob("*.json"), *folder.glob("group-*")):
        old.unlink()
    processes = [context.Process(target=calibrate, args=(rank, count, folder, strategy, seconds)) for rank in range(count)]
    for process in processes:
        process.start()
    try:
        wait_for(lambda: len(list(folder.glob("*.begun"))) == count, ids(processes))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def ids(processes: list[BaseProcess]) -> list[int]:
    return [process.pid or 0 for process in processes]


def result_of(folder: Path, rank: int, processes: list[BaseProcess]) -> dict[str, Any]:
    wait_for((folder / f"{rank}.json").is_file, ids(processes))
    return json.loads((folder / f"{rank}.json").read_text())


@pytest.fixture(scope="module")
def reference() -> NullSpaces:
    return compute(None, "resident")


@pytest.fixture(scope="module")
def sums() -> dict[str, torch.Tensor]:
    stream = stream_covariances(deep_model(), batches(), precision="fp64", progress=False)
    return {site.name: covariance.matrix() for site, covariance in stream}


def assert_same(found: NullSpaces, reference: NullSpaces, sums: dict[str, torch.Tensor]) -> None:
    assert found.sites == reference.sites
    for site in found.sites:
        assert found[site.name].tokens == reference[site.name].tokens
        assert excess_over(found[site.name].basis, reference[site.name].basis, sums[site.name]) <= 1e-9


def kill_at_random(count: int, folder: Path, strategy: str, chance: random.Random, duration: float) -> int | None:
    """Start a calibration and kill one of its processes; how many have named it, or None if it was through before."""
    victim, named_by = chance.randrange(count), 0
    with calibrating(count, folder, strategy) as processes:
        time.sleep(chance.uniform(0, duration))
        if (folder / f"{victim}.json").is_file():
            return None
        processes[victim].kill()
        killed = time.monotonic()
        for rank in set(range(count)) - {victim}:
            said = result_of(folder, rank, processes)
            assert time.monotonic() - killed < GROUP_SECONDS
            if "error" in said:  # else it had no more to do with the others
                assert said["kind"] == "RankLost"
                # Another one that has not noticed yet, and is slow to answer, may be named beside.
                named = rf"^rank {rank} of {count} has lost (rank \d \(.*\) and )?rank {victim} {LAST_STEP}( and rank .*)? in "
                assert re.search(named, said["error"]), said["error"]
                named_by += 1
    return named_by


def test_whoever_is_killed_is_named_and_any_number_goes_on(
    tmp_path: Path, reference: NullSpaces, sums: dict[str, torch.Tensor]
) -> None:
    chance = random.Random(8)
    durations: dict[tuple[int, str], float] = {}
    named = 0
    for number, (count, then) in enumerate(TRIALS):
        strategy = ("layerwise", "resident")[number % 3 == 2]
        if (count, strategy) not in durations:
            whole = tmp_path / f"{count} {strategy}"
            whole.mkdir()
            with calibrating(count, whole, strategy) as processes:
                durations[count, strategy] = max(result_of(whole, rank, processes)["seconds"] for rank in range(count))
        for attempt in range(10):
            folder = tmp_path / f"{number} {attempt}"
            folder.mkdir()
            named_by = kill_at_random(count, folder, strategy, chance, durations[count, strategy])
            if named_by is not None:
                named += named_by
                break
        else:
            pytest.fail("no process was still at work when it was to be killed")
        finished = {path: path.stat().st_mtime_ns for path in (folder / "kept").glob("*.safetensors")}
        with calibrating(then, folder, strategy) as processes:
            assert [result_of(folder, rank, processes).get("error") for rank in range(then)] == [None] * then
        assert_same(NullSpaces.load(folder / "spaces"), reference, sums)
        assert {path: path.stat().st_mtime_ns for path in finished} == finished  # nothing was done twice
        assert len(list((folder / "kept").glob("*.safetensors"))) == len(reference.sites)
    assert named >= 2  # most are killed when the others still need them


def test_whoever_stalls_is_named_when_the_groups_time_is_up(tmp_path: Path) -> None:
    with calibrating(2, tmp_path, "layerwise", seconds=5 * slowness()) as processes:
        os.kill(processes[1].pid or 0, signal.SIGSTOP)
        said = result_of(tmp_path, 0, processes)
    assert said["kind"] == "RankLost"
    assert re.search(rf"^rank 0 of 2 has lost rank 1 {LAST_STEP} in .*[Tt]imed out", said["error"], re.DOTALL)


def workers_of(pid: int) -> dict[int, int]:
    """Rank → process, of what `torchrun` has started and what takes part."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            parent = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            environment = dict(e.split("=", 1) for e in folder.joinpath("environ").read_text().split("\0") if "=" in e)
            if parent == pid and "RANK" in environment:
                found[int(environment["RANK"])] = int(folder.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_under_torchrun_the_command_says_who_was_lost_and_goes_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    letters = random.Random(0)
    data = tmp_path / "data.txt"
    data.write_text("".join(chr(letters.randrange(32, 0x3000)) for _ in range(8000)))
    small = ["--data", str(data), "--samples", "120", "--length", "128", "--batch-size", "1", "--rank", "8", "--precision", "fp64"]
    command = ["-m", "nullspace", "init", str(tiny_checkpoint), "--out", str(tmp_path / "out"), *small, "--strategy", "layerwise"]
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def has_begun() -> bool:
        return process.poll() is not None or any(tmp_path.glob("out*checkpoint*/*.safetensors"))

    process = subprocess.Popen(
        [sys.executable, *together, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    wait_for(has_begun, [process.pid])
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)  # not the one that would speak for all
    done = finish(process)
    assert done.returncode != 0
    assert re.search(rf"failed: rank 1 of 2 has lost rank 0 {LAST_STEP} in ", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*command[2:], "--json"])
    assert done.exit_code == 0, done.output
    assert {site["tokens"] for site in json.loads(done.stdout)["sites"]} == {120 * 128}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.txt", "out"]
