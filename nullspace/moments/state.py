"""What a file holds of a covariance, and the check of it: everything that is read has these types, shapes and signs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from nullspace.checks import an_object, check_fields, check_tensor, finite, list_of, optional, whole
from nullspace.errors import InputError
from nullspace.moments.sums import GramSums
from nullspace.moments.sums_qr import QrSums

# The facts, beside the tensors. The fields of `sums` depend on which tensors there are, and are checked after these.
FIELDS = {
    "d_in": whole(1),
    "tokens": whole(),
    "mass": finite(0),
    "outliers": whole(),
    "sums": an_object(),
    "samples": optional(list_of(finite(0), least=2, most=2)),  # earlier versions did not keep them
}
# Of the one large tensor.
DTYPES = (torch.float64, torch.float32)


def check_state(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError` unless facts and tensors are those of a covariance."""
    where = "the facts of a covariance"
    check_fields(facts, FIELDS, where)
    kind, name = (QrSums, "root") if "root" in tensors else (GramSums, "triangle")
    check_fields(facts["sums"], dict.fromkeys(kind.LOSSES, finite(0)), f"{where}, 'sums'")
    d = facts["d_in"]
    large = check_tensor(tensors, name, (d * (d + 1) // 2,), DTYPES, "a covariance")
    check_tensor(tensors, "total", (d,), (torch.float64,), "a covariance")
    if name == "triangle":
        diagonal = large[torch.arange(1, d + 1).cumsum(0) - 1]
        if bool((diagonal < 0).any()):
            raise InputError("a covariance: the diagonal of its triangle holds sums of squares, and one is negative")
        trace = float(diagonal.sum(dtype=torch.float64))
    else:
        norm = float(torch.linalg.vector_norm(large, dtype=torch.float64))
        trace = norm * norm
    if trace == math.inf:
        raise InputError("a covariance: its trace is beyond the range of float64")
