"""A calibration checks its arguments, finds its targets and reads its weights once, however many passes it makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import random_batches, tiny
from nullspace import compute_covariances, compute_null_spaces, stream_covariances
from nullspace.artifacts import identity
from nullspace.calibration import run, stream

ONCE = ("check_options", "unwrap", "find_targets", "refuse_meta", "warn_of_residual", "resolve_strategy", "fingerprint_of_run")
COMPUTE: dict[str, Callable[..., Any]] = {
    # No sum in float32 is within such a tolerance: every site is summed again in float64.
    "null spaces": lambda model, loader, folder: compute_null_spaces(
        model, loader, rank=4, tolerance=0.0, checkpoint=folder / "kept", progress=False
    ),
    "covariances": lambda model, loader, folder: compute_covariances(
        model, loader, folder / "out", checkpoint=folder / "kept", progress=False
    ),
    "stream": lambda model, loader, folder: list(stream_covariances(model, loader, progress=False)),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often what was called: functions by name, fingerprints by the tensor."""
    counted: Counter[Any] = Counter()

    def counting(module: Any, name: str, key: Callable[..., Any]) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counted[key(*args, **kwargs)] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ONCE:
        counting(run, name, lambda *_, name=name, **__: name)
    counting(run.sharded, "prepare_sharded", lambda *_, **__: "prepare")
    for name in ("stream_resident", "stream_by_block"):
        counting(stream, name, lambda *_, **__: "pass")
    counting(identity, "fingerprint", lambda weight: (weight.data_ptr(), tuple(weight.shape)))
    return counted


@pytest.mark.filterwarnings("ignore:.* span fewer directions")
@pytest.mark.parametrize("kind", COMPUTE)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_everything_is_checked_and_every_weight_is_read_once(calls: Counter[Any], kind: str, family: str, tmp_path: Path) -> None:
    model = tiny(family)
    COMPUTE[kind](model, random_batches(8), tmp_path)
    assert calls["pass"] == (2 if kind == "null spaces" else 1)
    used = ONCE if kind != "stream" else ONCE[:-1]
    assert {name: calls[name] for name in (*used, "prepare")} == dict.fromkeys((*used, "prepare"), 1)
    weights = {key: count for key, count in calls.items() if isinstance(key, tuple)}
    assert set(weights.values()) <= {1}
    if kind != "stream":  # which needs no fingerprint where it is alone
        assert {(p.data_ptr(), tuple(p.shape)) for p in model.parameters()} <= weights.keys()


def test_the_test_would_count_twice(calls: Counter[Any]) -> None:
    weight = torch.ones(3, 3)
    identity.weights_of({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    for _ in range(2):
        identity.fingerprint(weight)
    assert calls[weight.data_ptr(), (3, 3)] == 2
