"""What several processes find, compared with what one finds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from nullspace import Covariance, NullSpaces, Site, compute_null_spaces, stream_covariances
from nullspace.distributed import Job
from processes import GROUP_SECONDS
from reference import excess_over


def compute(model: nn.Module, loader: Any, **options: Any) -> NullSpaces:
    return compute_null_spaces(model, loader, **{"rank": 8, "progress": False, **options})


def stream(model: nn.Module, loader: Any, **options: Any) -> dict[Site, Covariance]:
    return dict(stream_covariances(model, loader, progress=False, **options))


def alone(model: nn.Module, loader: Any, **options: Any) -> NullSpaces:
    return compute(model, loader, job=Job.alone(), **options)


def assert_as_good(found: NullSpaces, model: nn.Module, loader: Any, **options: Any) -> None:
    expected = alone(model, loader, **options)
    assert found.sites == expected.sites
    for site in expected.sites:
        ours, theirs = found[site.name], expected[site.name]
        assert (ours.tokens, ours.outliers) == (theirs.tokens, theirs.outliers), site
        assert ours.precision in (theirs.precision, "fp64"), site  # a share may have too few tokens for float32 products
        torch.testing.assert_close(ours.trace, theirs.trace, rtol=1e-6, atol=0)
        assert ours.basis.device.type == "cpu"
    sums = stream(model, loader, precision="fp64", job=Job.alone())
    for site, total in sums.items():
        assert excess_over(found[site.name].basis, expected[site.name].basis, total.matrix()) <= 1e-9


def refused(kind: type[Exception], says: str, call: Callable[[], Any]) -> str:
    """The error of `call`, which is to be of this kind on every rank, before the group's time is up."""
    began = time.monotonic()
    with pytest.raises(kind, match=says) as error:
        call()
    assert time.monotonic() - began < GROUP_SECONDS
    return str(error.value)


@contextlib.contextmanager
def counting_questions(model: nn.Module) -> Iterator[Counter[Any]]:
    """How often processes exchange what, until the model's first forward pass.

    Keys are the names of facts that are compared (`Job.check_same`), or the asking function and the value that it gives. Exchanges
    of None share errors alone, and are not counted.
    """
    asked: Counter[Any] = Counter()
    exchange, counts = Job.exchange, [True]

    def counted(job: Job, value: Any) -> Any:
        asking = sys._getframe(1).f_code.co_name
        if counts[0] and value is not None:
            asked.update(list(value) if asking == "check_same" else [(asking, repr(value))])
        return exchange(job, value)

    handle = model.register_forward_pre_hook(lambda *_: counts.__setitem__(0, False))
    Job.exchange = counted  # type: ignore[method-assign]
    try:
        yield asked
    finally:
        Job.exchange = exchange  # type: ignore[method-assign]
        handle.remove()
    assert not counts[0]
