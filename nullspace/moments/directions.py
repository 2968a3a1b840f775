"""`Directions`: sites whose data span fewer directions than a method needs, collected for one warning."""

from __future__ import annotations

import warnings
import weakref
from typing import NamedTuple

import torch

from nullspace import solvers
from nullspace.errors import DataWarning
from nullspace.moments.covariance import Covariance

# A warning lists so many names.
NAMES = 4


class Short(NamedTuple):
    """A site, or a layer, whose data span too few directions."""

    name: str
    spanned: int
    needed: int
    d_in: int


class Directions:
    """The sites of one call whose data span fewer directions than are needed."""

    def __init__(self) -> None:
        self._looked_at: set[str] = set()
        self._short: dict[str, Short] = {}
        # Covariance → how many directions are certain and possible, counted until so many were enough.
        self._known: weakref.WeakKeyDictionary[Covariance, tuple[int, int, int]] = weakref.WeakKeyDictionary()

    def add(self, name: str, spanned: int, needed: int, d_in: int) -> None:
        """Record how many directions the data of a site span, and how many are needed."""
        self._looked_at.add(name)
        if spanned < needed and name not in self._short:
            self._short[name] = Short(name, spanned, needed, d_in)

    def look_at(self, name: str, covariance: Covariance, needed: int, c: torch.Tensor, *, spared: int | None = None) -> None:
        """Count the directions of one layer's data: there are no more than tokens.

        Args:
            name: of the layer.
            covariance: of its inputs; decomposed once for layers that share it, unless a later one needs more.
            needed: how many directions must be present with certainty.
            c: (d_in, d_in) float64, its matrix; centred or not, but the same for every layer that shares the covariance.
            spared: all but so many directions must be present. Eigenvalues that float32 chains cannot tell from zero count as
                present.

        Cost: m³ / 3 flops, where m directions are needed, or 4/3 · d_in³ more where some may be missing.
        """
        most = needed if spared is None else max(needed, len(c) - spared)
        certain = possible = covariance.tokens
        if certain >= most:
            if covariance not in self._known or self._known[covariance][2] < most:
                self._known[covariance] = (*solvers.numerical_rank(c, noise_of(covariance), enough=most), most)
            certain, possible = (min(n, covariance.tokens) for n in self._known[covariance][:2])
        if certain < needed:
            self.add(name, certain, most, len(c))
        else:
            self.add(name, possible, most, len(c))

    def warn(self, what: str, *, stacklevel: int = 2) -> None:
        """Issue one `UserWarning` about all of them, if there are any.

        Args:
            what: what needs the directions, such as "method 'eva'".
            stacklevel: as of `warnings.warn`, counted from the caller.
        """
        text = self.text(what)
        if text:
            warnings.warn(text, DataWarning, stacklevel=stacklevel + 1)

    def text(self, what: str) -> str:
        """The text of the warning; empty if no site is short of directions."""
        if not self._short:
            return ""
        short = list(self._short.values())
        named = ", ".join(f"{s.name} ({s.spanned} of {s.d_in} directions, {s.needed} needed)" for s in short[:NAMES])
        return (
            f"the data of {len(short)} of {len(self._looked_at)} layers span fewer directions than {what} needs: {named}"
            f"{', …' if len(short) > NAMES else ''}. The rest is not what the data ask for: use more data, and more varied ones, "
            "or a smaller rank; or leave out layers whose inputs have no more directions."
        )


def noise_of(covariance: Covariance) -> float:
    """Eigenvalues of a covariance up to this size may be due to rounding."""
    return covariance.error_norm**2 if covariance.products == "qr" else covariance.error_norm
