"""Threads: BLAS with one thread, and a pool whose workers compute with one thread each."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from threadpoolctl import ThreadpoolController


@contextlib.contextmanager
def one_thread_each(n: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of n workers, in each of which BLAS and PyTorch compute with one thread.

        n = solvers.side_by_side(d)
        if n > 1:
            with solvers.one_thread_each(n) as pool:
                pairs = list(pool.map(lambda c: solvers.partial_eigh(c, k), matrices))

    What a worker returns has the bits that a call outside of the pool has with one thread (`"lapack-subset"` below d = 1024: with
    any number). Until the context ends, BLAS works with one thread in the whole process: nothing else that is large should run
    meanwhile. Grad and inference modes are per thread, and a worker starts with PyTorch's defaults.

    Args:
        n: at least 1.
    """
    threads = torch.get_num_threads()
    try:
        with one_blas_thread, ThreadPoolExecutor(n, "decomposition", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        # The number is a thread's own where PyTorch was built with OpenMP, and the process's elsewhere.
        torch.set_num_threads(threads)


@functools.cache
def blas() -> ThreadpoolController:
    """The BLAS libraries that are loaded when this is first called."""
    return ThreadpoolController()


class OneBlasThread:
    """A context in which BLAS works with one thread.

    The limit holds for the whole process. Several threads may be in such contexts, which overlap in any order: the first one to
    enter sets the limit, and the last one to leave lifts it.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limit = blas().limit(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limit.restore_original_limits()


one_blas_thread = OneBlasThread()
