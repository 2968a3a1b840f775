"""What an adapter is made of, from weights and second moments of inputs: pure functions of tensors, in float64.

- `starts`: the two factors before training, one function a method.
- `contrast`: a start from two second moments, of the task and of what must be kept.
- `filters`: after training, a change that keeps its effect on the task and loses that on what must be kept; several in one.
- `truncated`: a change cut to a smaller rank where its inputs notice it least.
"""

from nullspace.factors.contrast import contrast
from nullspace.factors.filters import RIDGE, Curve, Filter, Forecast, combined, filtered
from nullspace.factors.low_rank import LowRank
from nullspace.factors.starts import (
    CORDA_MODES,
    DAMPING,
    ZERO,
    b_zero,
    centred,
    corda,
    corda_exact,
    eva,
    lora_null,
    milora,
    orthogonal,
    pissa,
    sc_lora,
)
from nullspace.factors.truncation import truncated

__all__ = [
    "CORDA_MODES",
    "DAMPING",
    "RIDGE",
    "ZERO",
    "Curve",
    "Filter",
    "Forecast",
    "LowRank",
    "b_zero",
    "centred",
    "combined",
    "contrast",
    "corda",
    "corda_exact",
    "eva",
    "filtered",
    "lora_null",
    "milora",
    "orthogonal",
    "pissa",
    "sc_lora",
    "truncated",
]
