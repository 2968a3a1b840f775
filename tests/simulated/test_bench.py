"""The bench itself: what it must find, and what it must let pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("simulated.runtime", exc_type=ImportError)

from simulated.device import DeviceMismatchError, OnDevice
from simulated.kernels import LaunchError
from simulated.runtime import simulated_cuda
from simulated.streams import RaceError

from nullspace import csrc_triton


def test_values_gradients_and_identities_are_those_of_the_cpu(gpu: Any) -> None:
    for device in ("cuda:0", "cuda:1"):
        layer, x = nn.Linear(5, 3), torch.randn(4, 5)
        layer(x).square().sum().backward()
        expected, layer.weight.grad = layer.weight.grad, None
        layer.to(device)
        layer(x.to(device)).square().sum().backward()
        gradient = layer.weight.grad
        assert isinstance(layer.weight, nn.Parameter)
        assert isinstance(gradient, OnDevice)
        assert gradient.device == torch.device(device)
        assert gradient.is_cuda
        torch.testing.assert_close(gradient.cpu(), expected)
        assert layer.weight.to(device) is layer.weight
        assert gradient[1:].untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr()
        assert (gradient[1:].data_ptr() - gradient.data_ptr()) == 5 * 4


@pytest.mark.parametrize("others", [("cuda:1", (3,)), ("cpu", (3,))], ids=str)
def test_tensors_of_two_devices_do_not_mix(others: tuple[str, tuple[int, ...]], gpu: Any) -> None:
    place, shape = others
    x = torch.ones(3, device="cuda:0")
    with pytest.raises(DeviceMismatchError, match="cuda:0"):
        x + torch.ones(shape, device=place)
    torch.testing.assert_close((x + torch.tensor(1.0)).cpu(), torch.full((3,), 2.0))  # a scalar of the CPU may


def test_the_host_waits_where_it_wants_a_value(gpu: Any) -> None:
    x = torch.arange(6.0).to("cuda")

    def waits(call: Any) -> list[str]:
        gpu.waits.clear()
        call()
        return [wait.kind for wait in gpu.waits]

    assert waits(lambda: x.sum()) == []
    for call in (lambda: float(x.sum()), lambda: bool((x > 2).all()), lambda: x.nonzero(), lambda: x[x > 2], x.tolist, x.cpu):
        assert waits(call) == ["read"]
    assert waits(lambda: x.to("cpu", non_blocking=True)) == []
    pinned = torch.ones(6).pin_memory()
    assert pinned.is_pinned()
    assert waits(lambda: pinned.to("cuda", non_blocking=True)) == []
    assert waits(lambda: pinned.to("cuda")) == ["upload"]
    assert waits(lambda: torch.ones(6).to("cuda", non_blocking=True)) == ["upload"]


def test_a_result_of_another_stream_is_waited_for() -> None:
    def use(*, ordered: bool) -> None:
        with simulated_cuda():
            with torch.cuda.stream(torch.cuda.Stream()) as side:
                x = torch.ones(3).pin_memory().to("cuda", non_blocking=True)
            if ordered:
                torch.cuda.current_stream().wait_event(side.record_event())
            assert (x + 1).tolist() == [2, 2, 2]

    use(ordered=True)
    with pytest.raises(RaceError, match="may still be writing"):
        use(ordered=False)


def test_the_host_reads_a_copy_after_it_has_ended() -> None:
    with pytest.raises(RaceError, match="the host"), simulated_cuda():
        torch.ones(3, device="cuda").to("cpu", non_blocking=True).sum()
    with simulated_cuda():
        copy = torch.ones(3, device="cuda").to("cpu", non_blocking=True)
        torch.cuda.current_stream().synchronize()
        assert float(copy.sum()) == 3


def test_one_pinned_buffer_between_two_devices() -> None:
    def through(*, ordered: bool) -> None:
        with simulated_cuda(2):
            buffer = torch.empty(3, pin_memory=True)
            buffer.copy_(torch.ones(3, device="cuda:0"), non_blocking=True)
            if ordered:
                torch.cuda.current_stream("cuda:1").wait_event(torch.cuda.current_stream("cuda:0").record_event())
            assert buffer.to("cuda:1", non_blocking=True).tolist() == [1, 1, 1]

    through(ordered=True)
    with pytest.raises(RaceError, match="cuda:1"):
        through(ordered=False)


@pytest.mark.parametrize("way", ["record_stream", "an event", "the host"])
def test_memory_is_not_freed_while_another_stream_uses_it(way: str) -> None:
    def use(*, ordered: bool) -> None:
        with simulated_cuda():
            x, side = torch.ones(3, device="cuda"), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                y = x + 1
            if ordered and way == "record_stream":
                x.record_stream(side)
            elif ordered and way == "an event":
                torch.cuda.current_stream().wait_event(side.record_event())
            elif ordered:
                side.synchronize()
            del x
            del y

    use(ordered=True)
    with pytest.raises(AssertionError, match="without record_stream"):
        use(ordered=False)


def test_pieces_of_one_pinned_buffer_are_used_independently() -> None:
    def use(size: int) -> None:
        with simulated_cuda():
            memory = torch.ones(8, pin_memory=True)
            with torch.cuda.stream(torch.cuda.Stream()):
                memory[:size].copy_(torch.zeros(size, device="cuda"), non_blocking=True)
            assert memory[4:].to("cuda", non_blocking=True).tolist() == [1, 1, 1, 1]

    use(4)
    with pytest.raises(RaceError, match="may still be writing"):
        use(5)


def test_a_launch_on_another_device_is_refused(gpu: Any) -> None:
    from nullspace.csrc_triton.stage import _stage

    x = torch.ones(4, 32, device="cuda:1")
    with pytest.raises(LaunchError, match="x is on cuda:1, and the launch on cuda:0"):
        _stage[(1, 1)](x, x, x, x, x, 4, 32, 32, 32, GATHER=False, ROWS=32, COLUMNS=128, CHUNK=1024)
    csrc_triton.stage_rows(x, torch.empty_like(x))  # makes x's device the current one
