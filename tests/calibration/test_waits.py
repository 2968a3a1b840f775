"""How often the host waits for the GPU, counted with tensors that stand for a GPU's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from waits import Waits, as_on_a_gpu

from models import random_batches, tiny
from nullspace import stream_covariances
from nullspace.calibration.input_sums import InputSums
from nullspace.model.padding import Padding
from nullspace.moments.grouped import GroupedCovariance
from nullspace.moments.sums import TokenMask
from nullspace.moments.sums_triton import TritonSums


@pytest.fixture
def llama() -> nn.Module:
    model = tiny("llama")
    model.config._attn_implementation = "eager"  # with the default one, the model itself looks at its mask
    return model


def count(model: nn.Module, batches: int, strategy: str, padding: str | None, monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patch, as_on_a_gpu(patch) as waits:
        waits.put(list(model.parameters()) + list(model.buffers()))
        stream = stream_covariances(model, random_batches(batches=batches, padding=padding), strategy=strategy, progress=False)
        next(stream)  # the forward pass of a resident run
        if strategy == "layerwise":
            for _ in stream:
                pass
        return len(waits.seen)


@pytest.mark.parametrize(
    ("strategy", "passes", "padding"),
    [("resident", 1, None), ("resident", 1, "left"), ("layerwise", 3, None), ("layerwise", 3, "right")],
)
def test_the_host_waits_once_a_batch(
    strategy: str, passes: int, padding: str | None, llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in every block of a layerwise run, for what the batch before has shown; what a run waits for once is not counted."""
    few, many = (count(llama, batches, strategy, padding, monkeypatch) for batches in (2, 4))
    assert few > 0
    assert many - few == 2 * passes


def test_nan_is_reported_with_its_batch_one_batch_later(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(4, 4)
    monkeypatch.setattr("nullspace.moments.covariance.new_sums", lambda d, device, precision: TritonSums(d, device))
    monkeypatch.setattr(
        "nullspace.csrc_triton.stage_rows",
        lambda x, out, rows=None: (torch.linalg.vector_norm(x, dim=1), x.sum(0)),
        raising=False,
    )
    for later in (True, False):
        sums = InputSums({"a": layer, "b": layer}, "auto")
        for batch in (1, 2, 3):
            sums.begin_batch(batch, Padding())
            for name in ("a", "b"):
                sums.receive(name, torch.full((2, 4), float("nan") if (name, batch) == ("b", 2) else 1.0))
            if batch < 3:
                sums.end_batch()
            elif later:
                with pytest.raises(ValueError, match=r"b, batch 2: NaN or Inf in 2 of 2 tokens \(the first one is token 0\)"):
                    sums.end_batch()
            if batch == 2 and not later:
                with pytest.raises(ValueError, match="b, batch 2"):
                    list(sums.release())
                break


@pytest.mark.parametrize("grouped", [False, True])
def test_sums_wait_once_when_they_are_read_and_not_again(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with as_on_a_gpu(monkeypatch) as waits:
        x = waits.put(torch.randn(700, 8))
        if grouped:
            group = GroupedCovariance(3, 8)
            group.update(x, [600, 0, 100])
            members = [member._sums for member in group.members]
        else:
            members = [TritonSums(8, torch.device("cpu"))]
            members[0].add(x, TokenMask(torch.arange(700) % 3 > 0))
        waits.seen.clear()
        for member in members:
            member.launch()
        assert waits.seen == []
        for _ in range(2):
            for member in members:
                member.flush()
        assert waits.seen == ["tolist"]


def test_a_mask_of_the_host_is_read_there_and_uploaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[torch.device] = []

    def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        uploads.append(device)
        return tensor.to(device)

    monkeypatch.setattr("nullspace.moments.sums.upload", upload)
    mask, there = TokenMask(torch.tensor([1, 0, 1])), torch.device("meta")
    assert [mask.indices(torch.device("cpu")).tolist(), mask.count] == [[0, 2], 2]
    assert mask.indices(there) is mask.indices(there)
    assert uploads == [there]


def test_what_is_counted() -> None:
    """The count itself: numbers, shapes and boolean indices wait, and only of what stands for a GPU's."""
    with Waits() as waits:
        here = torch.ones(3)
        there = waits.put(torch.ones(3)) * here
        assert bool(here.any())
        assert waits.seen == []
        bool(there.any())
        here[there > 0]
        there.nonzero()
    assert [name.partition(".")[0] for name in waits.seen] == ["aten::_local_scalar_dense", "aten::index", "aten::nonzero"]
