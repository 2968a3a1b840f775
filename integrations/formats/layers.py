"""The layers that are asked for, checked before anything is computed or written."""

from __future__ import annotations

from collections.abc import Sequence

from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.sitewise import Sitewise
from nullspace.errors import InputError
from nullspace.moments.covariance import Covariance


def check_layers(source: Sitewise, layers: Sequence[str]) -> list[str]:
    """The names as a list; `ValueError` for none, a string, and a layer that is not there or named twice."""
    if isinstance(layers, str) or not layers:
        raise InputError(f"layers must be a list of names of layers, not {layers!r}")
    for number, name in enumerate(layers):
        if name not in source:
            known = ", ".join(list(source)[:3])
            raise InputError(f"there is no {source.WHAT} for {name!r}; there are such for {known}, … ({len(source)} layers)")
        if name in layers[:number]:
            raise InputError(f"the layer {name!r} is named twice")
    return list(layers)


def with_tokens(covariances: Covariances, name: str) -> Covariance:
    """The second moment of a layer, an expert's completed by its layer's; `ValueError`, naming it, without any token."""
    covariance = covariances[name]
    covariance = covariance.completed(covariance.d_in)
    if not covariance.tokens:
        raise InputError(f"no token has reached {name!r}: leave it out, or calibrate on more data")
    return covariance
