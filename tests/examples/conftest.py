"""What the tests of the examples share."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from material import EXAMPLES, Material, write_material


@pytest.fixture(scope="session")
def material(tiny_checkpoint: Path, prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Tiny models and small data."""
    return write_material(tmp_path_factory.mktemp("examples"), tiny_checkpoint, prose)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs an example's `main` in an empty folder, with a command line."""
    monkeypatch.chdir(tmp_path)

    def of(name: str, *arguments: object) -> None:
        runpy.run_path(str(EXAMPLES / name))["main"]([str(each) for each in arguments])

    return of
