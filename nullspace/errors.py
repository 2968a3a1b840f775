"""Exceptions and warnings of this package. Each is also the builtin class that says what kind of mistake it is.

>>> from nullspace.errors import InputError, NullspaceError
>>> issubclass(InputError, NullspaceError) and issubclass(InputError, ValueError)
True

Errors of other libraries and of the operating system (a full disk, a missing permission) keep their own classes.
"""

from __future__ import annotations


class NullspaceError(Exception):
    """Base of all exceptions of this package."""


class InputError(NullspaceError, ValueError):
    """An argument, model, batch or file that cannot be used. The text names it and says what to do."""


class DamagedFileError(InputError):
    """A file of an artifact or checkpoint that is truncated, altered, or was written by something else."""


class OtherModelError(InputError):
    """Artifacts, adapters or a checkpoint that were made for another model or run."""


class InputTypeError(NullspaceError, TypeError):
    """An argument of a type that is not accepted."""


class MissingFileError(NullspaceError, FileNotFoundError):
    """A file or folder that does not exist."""


class OutputError(NullspaceError, OSError):
    """A place that nothing can be written to."""


class OutputExistsError(NullspaceError, FileExistsError):
    """A place to write to that holds something else."""


class Busy(OutputExistsError):
    """Another run is writing to the same place."""


class InsufficientMemoryError(NullspaceError, MemoryError):
    """Memory that does not suffice. The text says what would be needed."""


class MissingPackageError(NullspaceError, ImportError):
    """An optional package that is not installed. The text has the command that installs it."""


class RunError(NullspaceError, RuntimeError):
    """A computation that failed though its input was valid."""


class RankLost(RunError):
    """A process has died, or does not answer within the group's timeout.

    Args:
        text: names it, and the last step that it reported.
        reports: whether this process is the first of those that are left, which prints the error for all.
    """

    def __init__(self, text: str, *, reports: bool = True) -> None:
        super().__init__(text)
        self.reports = reports


class NullspaceWarning(UserWarning):
    """Base of all warnings of this package."""


class PrecisionWarning(NullspaceWarning):
    """Rounding may have moved a basis by more than the tolerance."""


class DataWarning(NullspaceWarning):
    """Calibration data that may not be what is meant: too few tokens, or padding that is counted."""


class TargetWarning(NullspaceWarning):
    """Layers or parameters that are left out of the targets."""


class ResourceUseWarning(NullspaceWarning):
    """A slower way is taken, or memory is expected to run out."""


class AdapterWarning(NullspaceWarning):
    """An adapter that is used or configured in a way that changes what the model computes."""
