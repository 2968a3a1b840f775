"""Directories that were written before the package was divided: they are read as they were, and models and data are recognised.

`written_before/` was written by version 0.1.0 as one flat package, of four layers of `model()` on `random_batches(4)`: null spaces
of rank 4, their finished checkpoint, and shard 1 of 2 of the covariances in float32.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from models import random_batches, tiny
from nullspace import Covariances, NullSpaces
from nullspace.artifacts.checkpoint import Checkpoint
from nullspace.artifacts.identity import fingerprint_of_run
from nullspace.artifacts.null_space import NullSpace
from nullspace.artifacts.records import read_sealed
from nullspace.model.sites import find_targets

BEFORE = Path(__file__).with_name("written_before")
TARGETS = r".*layers\.0\.(self_attn|mlp)\.(q_proj|k_proj|o_proj|down_proj)"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Its weights are quotients of integers: the same on every machine."""
    made = tiny("llama")
    with torch.no_grad():
        for index, parameter in enumerate(made.parameters()):
            order = torch.arange(parameter.numel(), dtype=torch.int64) * 7919 + 31 * index
            parameter.copy_(((order % 1009 - 504) / 4096.0).view(parameter.shape) + (parameter.ndim == 1))
    return made


def test_null_spaces_and_covariances_are_read_and_know_their_model(model: nn.Module) -> None:
    spaces, covariances = NullSpaces.load(BEFORE / "spaces"), Covariances.load(BEFORE / "covariances", partial=True)
    targets = find_targets(model, TARGETS)
    assert list(spaces) == list(covariances) == list(targets)
    for name, layer in targets.items():
        spaces.check(name, layer)
        covariances.check(name, layer)
        assert (spaces[name].rank, spaces[name].tokens, covariances[name].tokens) == (4, 1024, 512)
        # Half of the data gives at most as much in each direction as all of them.
        basis, c = spaces[name].basis, covariances[name].matrix()
        assert ((basis.T @ c @ basis).diagonal() <= spaces[name].eigenvalues * (1 + 1e-5) + 1e-9 * spaces[name].trace).all()
    with torch.no_grad():
        next(iter(targets.values())).weight[0, 0] += 1
    with pytest.raises(ValueError, match="another model"):
        spaces.check(*next(iter(targets.items())))
    with torch.no_grad():
        next(iter(targets.values())).weight[0, 0] -= 1


def test_a_checkpoint_is_continued(model: nn.Module, tmp_path: Path) -> None:
    shutil.copytree(BEFORE / "checkpoint", tmp_path / "kept")
    run = read_sealed(tmp_path / "kept" / "run.json")
    settings = {key: run[key] for key in ("rank", "precision", "tolerance", "spectrum", "strategy", "avoid")}
    now = fingerprint_of_run(model, random_batches(4), find_targets(model, TARGETS), settings)
    assert {**now, "versions": run["versions"]} == run
    spaces = NullSpaces.load(BEFORE / "spaces")
    kept = [NullSpace.from_facts(facts, read()) for facts, read in Checkpoint(tmp_path / "kept", run).load()]
    assert [each.facts() for each in kept] == [spaces[site.name].facts() for site in spaces.sites]
    assert all(torch.equal(each.basis, spaces[each.site.name].basis) for each in kept)
