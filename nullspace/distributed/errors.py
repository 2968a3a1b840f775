"""Errors of one process that all processes of a job raise, and the error that names a process that is lost."""

from __future__ import annotations

import torch

# What an error of another process is raised as: the first that it is an instance of.
KINDS: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    OSError,
    torch.cuda.OutOfMemoryError,
    MemoryError,
    RuntimeError,
)


class RankLost(RuntimeError):
    """A process has died, or does not answer in the time that the group gives it.

    Args:
        text: names it, and the last step that it reported.
        reports: whether this process is the first of those that are left, which prints the error for all.
    """

    def __init__(self, text: str, *, reports: bool = True) -> None:
        super().__init__(text)
        self.reports = reports


def was_shared(error: BaseException | None) -> bool:
    """Whether an exception, or its cause, has been raised on all processes."""
    while error is not None:
        if getattr(error, "_nullspace_was_shared", False):
            return True
        error = error.__cause__ or error.__context__
    return False


def as_shared(error: Exception) -> Exception:
    """The same exception, marked as raised on all processes."""
    error._nullspace_was_shared = True  # type: ignore[attr-defined]
    return error


def described(error: Exception) -> tuple[int, str]:
    """Kind and text of an exception, for `rebuilt` in another process."""
    kind = next((i for i, each in enumerate(KINDS) if isinstance(error, each)), len(KINDS) - 1)
    return kind, str(error) or type(error).__name__


def rebuilt(kind: int, text: str) -> Exception:
    """The exception of `described`, marked as raised on all processes."""
    return as_shared(KINDS[kind](text))
