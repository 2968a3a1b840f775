"""A model of tensor cores, for kernels that run where there are none.

16-bit inputs: so many products and the accumulator are aligned to the largest exponent among them, cut off so many binary
places behind it, added, and rounded toward zero to float32 (the rules that arXiv 2511.10909 found by experiment: 16 products and
25 places on Hopper, 8 and 24 on Ampere). numpy's product, which Triton's interpreter takes, rounds to nearest: with it, a kernel
that sums too long a chain looks better than it is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NOTHING = -10_000  # exponent of zero


class TensorCore(NamedTuple):
    """Products that are rounded together, and the binary places they keep."""

    step: int
    places: int

    def dot(self, a_mk: np.ndarray, b_kn: np.ndarray, c_mn: np.ndarray) -> np.ndarray:
        """c + a @ b in float32, as one chain along the k axis; any axes before the last two are a batch."""
        a, b, c = (np.asarray(x, dtype=np.float64) for x in (a_mk, b_kn, c_mn))
        for k in range(0, a.shape[-1], self.step):
            c = self._add(a[..., k : k + self.step], b[..., k : k + self.step, :], c)
        return c.astype(np.float32)

    def _add(self, a_mk: np.ndarray, b_kn: np.ndarray, c_mn: np.ndarray) -> np.ndarray:
        left, right = np.moveaxis(a_mk, -1, 0)[..., :, None], np.moveaxis(b_kn, -2, 0)[..., None, :]
        exponents = (_exponent(left) + _exponent(right)).max(axis=0)
        unit = np.ldexp(1.0, np.maximum(np.maximum(exponents, _exponent(c_mn)), -900) - self.places)
        return _toward_zero((np.trunc(left * right / unit).sum(axis=0) + np.trunc(c_mn / unit)) * unit)


HOPPER = TensorCore(step=16, places=25)
AMPERE = TensorCore(step=8, places=24)


def _exponent(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, NOTHING, np.frexp(x)[1] - 1)


def _toward_zero(x: np.ndarray) -> np.ndarray:
    nearest = x.astype(np.float32)
    too_far = np.abs(nearest.astype(np.float64)) > np.abs(x)
    return np.where(too_far, np.nextafter(nearest, np.float32(0)), nearest).astype(np.float64)
