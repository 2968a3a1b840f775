"""Every strategy, precision and place of weights and hidden states on simulated GPUs: no mismatch, no race, the sums of the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from mixtures import MIXTURES

pytest.importorskip("simulated.runtime", exc_type=ImportError)

from simulated.references import batches_of, model_of, spread, sums_of

from nullspace import Covariance, Site, compute_null_spaces, stream_covariances
from nullspace.calibration.hidden_states import PLACES
from nullspace.moments.precision import PRECISIONS

CUDA = torch.device("cuda", 0)
PADDINGS = [None, "left", "right"]


def check(
    stream: Iterable[tuple[Site, Covariance]],
    expected: dict[str, tuple[torch.Tensor, int]],
    where: dict[str, torch.device] | None = None,
) -> None:
    """Sums of all sites, on their devices, equal to the CPU's up to float32 forward passes."""
    seen = []
    for site, covariance in stream:
        matrix, tokens = expected[site.name]
        found = covariance.matrix()
        assert covariance.tokens == tokens
        assert found.device == covariance.device == (where or {}).get(site.name, CUDA)
        assert (found.cpu() - matrix).norm() <= 1e-5 * matrix.norm()
        seen += site.members
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_resident(precision: str, padding: str | None, gpu: Any) -> None:
    model = model_of("llama").to(CUDA)
    check(
        stream_covariances(model, batches_of(padding), strategy="resident", precision=precision, progress=False),
        sums_of("llama", padding),
    )
    assert bool(gpu.launches) == (precision in ("auto", "mixed"))


@pytest.mark.parametrize("hidden_states", PLACES)
@pytest.mark.parametrize("weights", ["device", "host", "disk"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_layerwise(padding: str | None, weights: str, hidden_states: str, gpu: Any, tmp_path: Path) -> None:
    model = model_of("llama")
    if weights == "device":
        model.to(CUDA)
    elif weights == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=CUDA)
    stream = stream_covariances(
        model, batches_of(padding), strategy="layerwise", device=CUDA, hidden_states=hidden_states, progress=False
    )
    check(stream, sums_of("llama", padding))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_null_spaces_in_every_precision(strategy: str, precision: str, gpu: Any) -> None:
    spaces = compute_null_spaces(
        model_of("qwen2").to(CUDA), batches_of("left"), rank=4, strategy=strategy, precision=precision, progress=False
    )
    for name, (matrix, _) in sums_of("qwen2", "left").items():
        leak = torch.einsum("dk,de,ek->", (basis := spaces[name].basis.double()).cpu(), matrix, basis.cpu()) / matrix.trace()
        assert float(leak) <= float(torch.linalg.eigvalsh(matrix)[:4].sum() / matrix.trace()) + 1e-6


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("batches", ["on the host", "on the device"])
@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_batches_on_either_side(strategy: str, batches: str, padding: str | None, gpu: Any) -> None:
    place = "cuda" if batches == "on the device" else "cpu"
    loader = [{name: value.to(place) for name, value in batch.items()} for batch in batches_of(padding)]
    check(stream_covariances(model_of("llama").to(CUDA), loader, strategy=strategy, progress=False), sums_of("llama", padding))


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3"])
@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_families(strategy: str, family: str, dtype: torch.dtype, gpu: Any) -> None:
    """Tied embeddings, Conv1D, masks of two kinds."""
    check(
        stream_covariances(model_of(family, dtype).to(CUDA), batches_of("left"), strategy=strategy, progress=False),
        sums_of(family, "left"),
    )


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("experts", ["each", "pooled"])
@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_fused_experts(strategy: str, experts: str, family: str, gpu: Any) -> None:
    stream = stream_covariances(model_of(family).to(CUDA), batches_of("right"), strategy=strategy, experts=experts, progress=False)
    check(stream, sums_of(family, "right", experts))


@pytest.mark.parametrize("hidden_states", PLACES)
@pytest.mark.parametrize(
    "targets", ["all-linear", ["layers.2.mlp.up_proj", "layers.2.mlp.down_proj"]], ids=["all", "the last block"]
)
@pytest.mark.parametrize("order", [(0, 1, 0), (1, 1, 0), (0, 0, 1)], ids=str)
def test_layerwise_over_two_devices(order: tuple[int, ...], targets: Any, hidden_states: str, gpu: Any) -> None:
    model, where = spread(order)
    expected = {
        name: value for name, value in sums_of("llama", "left").items() if targets == "all-linear" or name.endswith(tuple(targets))
    }
    stream = stream_covariances(
        model, batches_of("left"), targets=targets, strategy="layerwise", hidden_states=hidden_states, progress=False
    )
    check(stream, expected, {name: where[name.rpartition(".layers.")[2][0]] for name in expected})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resident_over_two_devices(precision: str, gpu: Any) -> None:
    model, where = spread((0, 1, 0))
    expected = sums_of("llama", "left")
    stream = stream_covariances(model, batches_of("left"), strategy="resident", precision=precision, progress=False)
    check(stream, expected, {name: where[name.rpartition(".layers.")[2][0]] for name in expected})
