"""LoRA adapters in the null space of a model's activations.

>>> from nullspace import compute_null_spaces
>>> spaces = compute_null_spaces(model, loader, rank=128)                                       # doctest: +SKIP

One calibration pass sums the second moment of every linear layer's input. Its bottom eigenvectors are the directions that these
inputs hardly take, and an adapter that reads only these can be trained without disturbing what the model knows
(LoRA-Null, arXiv 2503.02659).

Names and submodules are imported when they are first used: `import nullspace` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nullspace.artifacts.covariances import Covariances
    from nullspace.artifacts.null_space import NullSpace
    from nullspace.artifacts.spaces import NullSpaces
    from nullspace.calibration.covariances import compute_covariances
    from nullspace.calibration.gradients import gradient_covariances
    from nullspace.calibration.null_spaces import compute_null_spaces
    from nullspace.calibration.stream import stream_covariances
    from nullspace.errors import NullspaceError, NullspaceWarning
    from nullspace.integrations.peft.from_data.prepare import prepare
    from nullspace.model.sites import Site
    from nullspace.moments.covariance import Covariance

__version__ = "0.1.0"

__all__ = [
    "Covariance",
    "Covariances",
    "NullSpace",
    "NullSpaces",
    "NullspaceError",
    "NullspaceWarning",
    "Site",
    "__version__",
    "compute_covariances",
    "compute_null_spaces",
    "gradient_covariances",
    "prepare",
    "stream_covariances",
]

_MODULES = {
    "Covariance": "moments.covariance",
    "Covariances": "artifacts.covariances",
    "NullSpace": "artifacts.null_space",
    "NullSpaces": "artifacts.spaces",
    "NullspaceError": "errors",
    "NullspaceWarning": "errors",
    "Site": "model.sites",
    "compute_covariances": "calibration.covariances",
    "compute_null_spaces": "calibration.null_spaces",
    "gradient_covariances": "calibration.gradients",
    "prepare": "integrations.peft.from_data.prepare",
    "stream_covariances": "calibration.stream",
}
_SUBMODULES = ("analysis", "cli", "csrc_triton", "distributed", "errors", "factors", "integrations", "methods", "solvers")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
