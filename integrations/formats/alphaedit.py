"""AlphaEdit's projectors (arXiv 2410.02355) as its code keeps them, and EasyEdit reads them.

`null_space_project.pt` (EasyEdit's `P_loc`) is one tensor, (layers, d_in, d_in) float32, by `torch.save`: P of every layer that is
edited, in the order of `layers` in the hyperparameters. Edits are Δ P, with Δ (d_out, d_in) as this package has weights.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from nullspace.artifacts import store
from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.spaces import NullSpaces
from nullspace.checks import POSITIVE, check_real
from nullspace.errors import DataWarning, InputError
from nullspace.factors import THRESHOLD, alphaedit
from nullspace.integrations.formats.layers import check_layers, with_tokens


def write_projectors(
    source: Covariances | NullSpaces,
    out: str | os.PathLike[str],
    *,
    layers: Sequence[str],
    threshold: float | None = None,
    overwrite: bool = False,
) -> list[int]:
    """Write `null_space_project.pt`. In a process group, call it in one process.

    Args:
        source: covariances: the directions are those whose eigenvalue per token is below the threshold, as in AlphaEdit's code
            (`nullspace.factors.alphaedit`). Null spaces: the directions are those of their bases, as many as their rank, whatever
            the norm of the inputs.
        out: the file.
        layers: those that are edited, in the order of the hyperparameters; all of one width.
        threshold: `nullspace_threshold` of the hyperparameters, for covariances; 0.02 by default.
        overwrite: replace a file that is there.

    Returns:
        The number of directions of every layer.

    Raises:
        ValueError: naming the layer, if there is nothing for it, or it has another width than the first; for a threshold that is
            not positive, or one with null spaces.
        FileExistsError: if the file is there.
        OSError: if it cannot be written; nothing is left behind.

    Warns:
        UserWarning: naming the layers of which no direction or every direction is below the threshold: the first cannot be edited,
            and edits of the second are not constrained.
    """
    if isinstance(source, NullSpaces) and threshold is not None:
        raise InputError("null spaces have their directions, as many as their rank: leave threshold out, or give covariances")
    threshold = check_real("threshold", THRESHOLD if threshold is None else threshold, POSITIVE)
    names = check_layers(source, layers)
    widths = {name: site.d_in for site in source.sites for name in site.members}
    d_in = widths[names[0]]
    for name in names:
        if widths[name] != d_in:
            raise InputError(f"one file holds layers of one width: {name!r} has {widths[name]} inputs, and {names[0]!r} {d_in}")
    store.check_free(out, Path.is_file, overwrite=overwrite)
    projectors = torch.zeros(len(names), d_in, d_in)
    for p, name in zip(projectors, names, strict=True):
        if isinstance(source, NullSpaces):
            basis = source[name].basis
            p.copy_(basis @ basis.mT)
        else:
            covariance = with_tokens(source, name)
            p.copy_(alphaedit(covariance.matrix() / covariance.mass, threshold=threshold))
    directions = [round(float(p.diagonal().sum(dtype=torch.float64))) for p in projectors]
    with store.new_file(out, overwritable=Path.is_file, overwrite=overwrite) as part:
        torch.save(projectors, part)
    odd = [f"{name!r} ({count} of {d_in})" for name, count in zip(names, directions, strict=True) if count in (0, d_in)]
    if odd:
        warnings.warn(
            f"at a threshold of {threshold:g} these layers have no direction or every one below it: {', '.join(odd)}. Choose "
            "another threshold, or give null spaces, whose rank says how many",
            DataWarning,
            stacklevel=2,
        )
    return directions
