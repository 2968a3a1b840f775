"""Errors of one process that all processes of a job raise."""

from __future__ import annotations

import torch

from nullspace import errors

# What an error of another process is raised as: the first that it is an instance of.
KINDS: tuple[type[Exception], ...] = (
    errors.DamagedFileError,
    errors.OtherModelError,
    errors.InputError,
    errors.InputTypeError,
    errors.MissingFileError,
    errors.Busy,
    errors.OutputExistsError,
    errors.OutputError,
    errors.InsufficientMemoryError,
    errors.MissingPackageError,
    errors.RunError,
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    OSError,
    torch.cuda.OutOfMemoryError,
    MemoryError,
    RuntimeError,
)


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
