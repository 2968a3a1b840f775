"""LoRA adapters in the null space of a model's activations.

>>> from nullspace import compute_null_spaces
>>> spaces = compute_null_spaces(model, loader, rank=128)                                       # doctest: +SKIP

One calibration pass sums the second moment of every linear layer's input, its bottom eigenvectors are directions that the
layer hardly hears, and an adapter that lives there can be trained without disturbing what the model knows
(LoRA-Null, arXiv 2503.02659).
"""

from nullspace.covariance import Covariance
from nullspace.covariances import Covariances, compute_covariances
from nullspace.sites import Site
from nullspace.spaces import NullSpace, NullSpaces, compute_null_spaces
from nullspace.stream import stream_covariances

__all__ = [
    "Covariance",
    "Covariances",
    "NullSpace",
    "NullSpaces",
    "Site",
    "compute_covariances",
    "compute_null_spaces",
    "stream_covariances",
]
