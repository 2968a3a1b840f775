"""LAPACK's steps through C pointers and through SciPy's wrappers: against the definition, NumPy, and each other."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.linalg import cython_lapack

from nullspace.solvers import lapack

EPS = float(np.finfo(np.float64).eps)
SIZES = [2, 3, 4, 7, 16, 31, 33, 64, 576]
ROUTES = ("pointers", "wrappers")


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch)
    return request.param


def take(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if route == "wrappers":
        monkeypatch.setattr(lapack, "_routine", lambda name: None)
    elif any(lapack._routine(name) is None for name in lapack.SIGNATURES):
        pytest.skip("this SciPy publishes other pointers")


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Pointers are looked up once in a process; here, again."""
    lapack._routine.cache_clear()
    yield
    lapack._routine.cache_clear()


def symmetric(d: int, seed: int = 0) -> np.ndarray:
    a = np.random.default_rng(seed).standard_normal((d, d))
    return a + a.T


def dense(diagonal: np.ndarray, beside: np.ndarray) -> np.ndarray:
    return np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)


def bottom(a: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray | None]:
    """All steps, and nothing else."""
    reflectors = a.copy()
    diagonal, beside, tau = lapack.tridiagonal(reflectors)
    values = lapack.eigenvalues(diagonal, beside)
    vectors = lapack.eigenvectors(diagonal, beside, values[:k])
    return values, None if vectors is None else lapack.rotate(reflectors, tau, vectors)


@pytest.mark.parametrize("d", SIZES)
def test_reflections_make_a_matrix_tridiagonal(d: int, route: str) -> None:
    a = symmetric(d)
    reflectors = a.copy()
    diagonal, beside, tau = lapack.tridiagonal(reflectors)
    assert (diagonal.shape, beside.shape, tau.shape) == ((d,), (d - 1,), (d - 1,))
    q = lapack.rotate(reflectors, tau, np.eye(d, order="F"))
    assert np.abs(q.T @ q - np.eye(d)).max() <= 8 * d * EPS
    assert np.abs(q @ dense(diagonal, beside) @ q.T - a).max() <= 8 * d * EPS * np.linalg.norm(a, 2)


@pytest.mark.parametrize("d", [2, 5, 64, 576])
def test_only_the_upper_triangle_is_read(d: int, route: str) -> None:
    whole, half = symmetric(d), np.triu(symmetric(d))
    half[np.tril_indices(d, -1)] = np.nan
    for one, other in zip(lapack.tridiagonal(whole), lapack.tridiagonal(half), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize(
    "make",
    [
        lambda d, rng: (rng.standard_normal(d), rng.standard_normal(d - 1)),
        lambda d, rng: (np.zeros(d), np.zeros(d - 1)),
        lambda d, rng: (rng.standard_normal(d), np.zeros(d - 1)),
        lambda d, rng: (np.full(d, 2.0), np.full(d - 1, -1.0)),
        lambda d, rng: (rng.standard_normal(d), rng.standard_normal(d - 1) * (np.arange(d - 1) % 3 > 0)),
    ],
    ids=["random", "zero", "diagonal", "second difference", "in pieces"],
)
def test_tridiagonal_eigenvalues_are_numpys(make: Callable[..., tuple[np.ndarray, np.ndarray]], d: int, route: str) -> None:
    diagonal, beside = make(d, np.random.default_rng(d))
    before = diagonal.copy(), beside.copy()
    values = lapack.eigenvalues(diagonal, beside)
    expected = np.linalg.eigvalsh(dense(diagonal, beside))
    np.testing.assert_allclose(values, expected, rtol=0.0, atol=8 * d * EPS * max(np.abs(expected).max(), 1e-300))
    for one, other in zip(before, (diagonal, beside), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_second_difference_has_the_eigenvalues_of_the_textbook(route: str) -> None:
    d = 63
    values = lapack.eigenvalues(np.full(d, 2.0), np.full(d - 1, -1.0))
    np.testing.assert_allclose(values, 2 - 2 * np.cos(np.pi * np.arange(1, d + 1) / (d + 1)), rtol=0.0, atol=64 * EPS)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_all_steps_give_eigenpairs(d: int, share: float, route: str) -> None:
    a, k = symmetric(d), max(1, int(share * d))
    values, vectors = bottom(a, k)
    assert vectors is not None
    assert vectors.shape == (d, k)
    assert vectors.flags.f_contiguous
    norm = np.linalg.norm(a, 2)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(a), rtol=0.0, atol=8 * d * EPS * norm)
    assert np.abs(a @ vectors - vectors * values[:k]).max() <= 8 * d * EPS * norm
    assert np.abs(vectors.T @ vectors - np.eye(k)).max() <= 1e-13


@pytest.mark.parametrize("d", SIZES)
def test_both_routes_agree_to_rounding(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, k, found = symmetric(d), (d + 3) // 4, []
    for route in ROUTES:
        with monkeypatch.context() as patch:
            take(route, patch)
            values, vectors = bottom(a, k)
            assert vectors is not None
            found.append((values, vectors @ vectors.T))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0.0, atol=1e-12 * d)


def test_a_wrong_argument_is_an_error() -> None:
    dsterf = lapack._routine("dsterf")
    if dsterf is None:
        pytest.skip("this SciPy publishes other pointers")
    with pytest.raises(ValueError, match="dsterf: argument 1 is wrong"):
        dsterf(-1, np.zeros(1), np.zeros(1))


def test_iterations_that_do_not_converge_are_an_error(route: str) -> None:
    with pytest.raises(np.linalg.LinAlgError, match="did not converge"):
        lapack.eigenvalues(np.array([1.0, np.nan, 2.0, 3.0]), np.ones(3))


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("name", lapack.SIGNATURES)
def test_a_pointer_that_is_missing_is_not_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (SimpleNamespace(), SimpleNamespace(__pyx_capi__={})):
        monkeypatch.setattr(lapack, "cython_lapack", module)
        lapack._routine.cache_clear()
        assert lapack._routine(name) is None


def capsule_named(signature: str) -> object:
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
        ("PyCapsule_New", ctypes.pythonapi)
    )
    return new(1, NAMES.setdefault(signature, signature.encode()), None)


NAMES: dict[str, bytes] = {}  # a capsule does not keep its name alive


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("name", lapack.SIGNATURES)
@pytest.mark.parametrize("change", [("int *", "int64_t *"), ("double", "float"), ("void (", "int ("), (" *)", " *, int *)")])
def test_a_pointer_of_another_signature_is_not_taken(name: str, change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    capsule = capsule_named(lapack.SIGNATURES[name].replace(*change))
    monkeypatch.setattr(lapack, "cython_lapack", SimpleNamespace(__pyx_capi__={name: capsule}))
    assert lapack._routine(name) is None


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("double", ["double", "__pyx_t_5scipy_6linalg_13cython_lapack_d"])
def test_either_name_of_double_is_known(double: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capsule = capsule_named(lapack.SIGNATURES["dsterf"].replace("double", double))
    monkeypatch.setattr(lapack, "cython_lapack", SimpleNamespace(__pyx_capi__={"dsterf": capsule}))
    assert lapack._routine("dsterf") is not None


@pytest.mark.usefixtures("forgetful")
def test_single_precision_is_not_taken_for_double(monkeypatch: pytest.MonkeyPatch) -> None:
    single = cython_lapack.__pyx_capi__["ssytrd"]
    monkeypatch.setattr(lapack, "cython_lapack", SimpleNamespace(__pyx_capi__={"dsytrd": single}))
    assert lapack._routine("dsytrd") is None
