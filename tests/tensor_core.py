"""A model of Hopper's tensor core, for kernels that run where there is none.

wgmma, 16-bit inputs: 16 products and the accumulator are aligned to the largest exponent among them, cut off 25 binary places
behind it, added, and rounded toward zero to float32 (the rules that arXiv 2511.10909 found by experiment). numpy's product,
which Triton's interpreter takes, rounds to nearest: with it, a kernel that sums too long a chain looks better than it is.
"""

from __future__ import annotations

import numpy as np

STEP = 16
FRACTION = 25
NOTHING = -10_000  # exponent of zero


def dot(a_mk: np.ndarray, b_kn: np.ndarray, c_mn: np.ndarray) -> np.ndarray:
    """c + a @ b in float32, as one chain: the k axis in steps of 16."""
    a, b, c = (np.asarray(x, dtype=np.float64) for x in (a_mk, b_kn, c_mn))
    for k in range(0, a.shape[1], STEP):
        c = _step(a[:, k : k + STEP], b[k : k + STEP], c)
    return c.astype(np.float32)


def _step(a_mk: np.ndarray, b_kn: np.ndarray, c_mn: np.ndarray) -> np.ndarray:
    products = a_mk.T[:, :, None] * b_kn[:, None, :]
    exponents = (_exponent(a_mk).T[:, :, None] + _exponent(b_kn)[:, None, :]).max(axis=0)
    unit = np.ldexp(1.0, np.maximum(np.maximum(exponents, _exponent(c_mn)), -900) - FRACTION)
    total = (np.trunc(products / unit).sum(axis=0) + np.trunc(c_mn / unit)) * unit
    return _toward_zero(total)


def _exponent(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, NOTHING, np.frexp(x)[1] - 1)


def _toward_zero(x: np.ndarray) -> np.ndarray:
    nearest = x.astype(np.float32)
    too_far = np.abs(nearest.astype(np.float64)) > np.abs(x)
    return np.where(too_far, np.nextafter(nearest, np.float32(0)), nearest).astype(np.float64)
