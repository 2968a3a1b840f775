"""An interrupt of a resident pass keeps the sums, and the next run ends with those of all batches."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models import random_batches, tiny
from nullspace import Covariances, compute_covariances, compute_null_spaces
from nullspace.calibration.interruption import batches_in
from nullspace.errors import NullspaceWarning
from nullspace.solvers import together
from reference import excess_over

BATCHES = random_batches(6, 4, 32)


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """SIGINT raises, also where pytest runs in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupting:
    """A `Progress` that raises a signal when a stage has come so far, and knows which steps of the forward pass were made."""

    def __init__(self, stage: str = "", done: int = 0, times: int = 1) -> None:
        self.forward: list[int] = []
        self._at, self._times = (stage, done), times

    def __call__(self, stage: str, done: int, total: int | None, tokens: int) -> None:
        if stage == "forward":
            self.forward.append(done)
        if (stage, done) == self._at:
            for _ in range(self._times):
                signal.raise_signal(signal.SIGINT)


def spaces(kept: Path | None, progress: Any = False) -> Any:
    return compute_null_spaces(
        tiny("llama"), BATCHES, rank=8, precision="fp64", strategy="resident", checkpoint=kept, progress=progress
    )


def covariances(out: Path, kept: Path, progress: Any) -> Covariances:
    return compute_covariances(tiny("llama"), BATCHES, out, strategy="resident", checkpoint=kept, progress=progress)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Covariances]:
    """Null spaces and covariances of runs that were not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return spaces(None), compute_covariances(tiny("llama"), BATCHES, folder / "sums", strategy="resident", progress=False)


def assert_whole(result: Any, whole: tuple[Any, Covariances]) -> None:
    assert result.sites == whole[0].sites
    for site in result.sites:
        one, other, sums = result[site.name], whole[0][site.name], whole[1][site.name].matrix()
        assert (one.tokens, one.outliers) == (other.tokens, other.outliers)
        assert abs(one.trace - other.trace) <= 1e-12 * other.trace
        assert excess_over(one.basis, other.basis, sums) <= 1e-9


def interrupted(run: Callable[[Any], Any], *where: Any) -> Interrupting:
    before, progress = signal.getsignal(signal.SIGINT), Interrupting(*where)
    with pytest.raises(KeyboardInterrupt):
        run(progress)
    assert signal.getsignal(signal.SIGINT) is before
    return progress


@pytest.mark.parametrize("stops", [[6], [2, 5]], ids=str)
def test_a_run_goes_on_behind_the_batch_of_its_interrupt(stops: list[int], tmp_path: Path, whole: Any) -> None:
    kept = tmp_path / "kept"
    begin = 0
    for stop in stops:
        made = interrupted(lambda progress: spaces(kept, progress), "forward", stop)
        assert made.forward == list(range(begin, stop + 1))
        assert batches_in(kept / "sums") == stop
        begin = stop
    last = Interrupting()
    assert_whole(spaces(kept, last), whole)
    assert last.forward == list(range(begin, 7))
    assert not (kept / "sums").exists()


def test_an_interrupt_between_solves_keeps_the_sums_of_the_sites_that_are_left(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "TOGETHER_BYTES", 1)  # each site is solved before the next one is drawn
    kept = tmp_path / "kept"
    interrupted(lambda progress: spaces(kept, progress), "null spaces", 4)  # q, k, v and o
    assert len(list(kept.glob("*.safetensors"))) == 2
    assert len(list((kept / "sums").glob("*.safetensors"))) == len(whole[0].sites) - 2
    last = Interrupting()
    assert_whole(spaces(kept, last), whole)
    assert last.forward == [6]


def test_covariances_go_on_too(tmp_path: Path, whole: Any) -> None:
    kept, out = tmp_path / "kept", tmp_path / "out"
    interrupted(lambda progress: covariances(out, kept, progress), "forward", 4)
    interrupted(lambda progress: covariances(out, kept, progress), "covariances", 4)
    assert not out.exists()
    last = Interrupting()
    result = covariances(out, kept, last)
    assert last.forward == [6]
    for site in result.sites:
        expected = whole[1][site.name]
        assert result[site.name].tokens == expected.tokens
        assert torch.allclose(result[site.name].matrix(), expected.matrix(), rtol=1e-12, atol=1e-12 * expected.trace)


def test_a_second_interrupt_ends_at_once_and_keeps_nothing(tmp_path: Path) -> None:
    made = interrupted(lambda progress: spaces(tmp_path / "kept", progress), "forward", 2, 2)
    assert made.forward == [0, 1, 2]
    assert batches_in(tmp_path / "kept" / "sums") is None


def test_damaged_sums_are_a_warning_and_the_pass_begins_anew(tmp_path: Path, whole: Any) -> None:
    kept = tmp_path / "kept"
    interrupted(lambda progress: spaces(kept, progress), "forward", 5)
    next((kept / "sums").glob("*.safetensors")).write_bytes(b"")
    last = Interrupting()
    with pytest.warns(NullspaceWarning, match="damaged: it begins anew"):
        assert_whole(spaces(kept, last), whole)
    assert last.forward == list(range(7))


def test_a_full_disk_is_a_warning_and_the_interrupt_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nullspace.calibration.interruption.write_sites", full)
    with pytest.warns(NullspaceWarning, match="sums so far are not kept: .*No space left"):
        interrupted(lambda progress: spaces(tmp_path / "kept", progress), "forward", 2)
    assert batches_in(tmp_path / "kept" / "sums") is None


def test_without_a_checkpoint_an_interrupt_is_immediate() -> None:
    assert interrupted(lambda progress: spaces(None, progress), "forward", 2).forward == [0, 1, 2]
