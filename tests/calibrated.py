"""What tests inject adapters with: null spaces and covariances of the tiny models, computed once a process."""

from __future__ import annotations

import functools
from typing import Any

from models import random_batches, tiny
from nullspace import Covariances, NullSpaces, compute_null_spaces, stream_covariances
from nullspace.artifacts.identity import weights_of
from nullspace.methods import METHODS
from nullspace.model.sites import find_targets

RANK = 8


@functools.cache
def spaces_for(family: str) -> NullSpaces:
    return compute_null_spaces(tiny(family), random_batches(), rank=RANK, progress=False)


@functools.cache
def covariances_for(family: str, seed: int = 1) -> Covariances:
    model = tiny(family)
    pairs = stream_covariances(model, random_batches(seed=seed), precision="fp64", progress=False)
    return Covariances(pairs, weights_of(find_targets(model)))


def sources_for(method: str, family: str) -> dict[str, Any]:
    """The keyword arguments of `inject_adapters` that say what a method's factors are made of."""
    needs = METHODS[method].needs
    return {
        **({"spaces": spaces_for(family)} if "spaces" in needs else {}),
        **({"covariances": covariances_for(family)} if "covariances" in needs else {}),
        **({"preserve": covariances_for(family, seed=2)} if "preserve" in needs else {}),
    }
