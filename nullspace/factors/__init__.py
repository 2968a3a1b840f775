"""What an adapter is made of, from weights and second moments of inputs: pure functions of tensors, in float64.

- `inputs`, `outputs`, `orthogonal`, `contrast`: the two factors before training, one function a method; from directions of the
  input, from directions of the output, random, and from two second moments, of the task and of what must be kept.
- `constraints`: the leading directions that a change is kept out of while it trains, and CLoRA's penalty.
- `tasks`: several tasks in a row, each kept out of the inputs or the rows of A of those before it.
- `filters`: after training, a change that keeps its effect on the task and loses that on what must be kept; several in one.
- `allocated`: the ranks of all layers within one budget of parameters, by what each rank buys.
- `truncated`: a change cut to a smaller rank where its inputs notice it least.
- `alphaedit`: the projector through which AlphaEdit edits a weight.
"""

from nullspace.factors.budget import Allocation, Offer, allocated, caught, spared
from nullspace.factors.constraints import Leading, clora, leading_inputs, leading_outputs, leading_singular
from nullspace.factors.contrast import contrast
from nullspace.factors.filters import RIDGE, Curve, Filter, Forecast, combined, filtered
from nullspace.factors.inputs import b_zero, centred, eva, lora_null
from nullspace.factors.low_rank import LowRank
from nullspace.factors.orthogonal import orthogonal
from nullspace.factors.outputs import (
    CORDA_MODES,
    DAMPING,
    LARGEST,
    SMALLEST,
    ZERO,
    astra,
    corda,
    corda_exact,
    mica,
    mica_data,
    milora,
    olora_tail,
    pissa,
    sc_lora,
    skipped,
    svd_llm,
)
from nullspace.factors.projection import THRESHOLD, alphaedit
from nullspace.factors.tasks import SHARE, inflora, overlap
from nullspace.factors.truncation import truncated

__all__ = [
    "CORDA_MODES",
    "DAMPING",
    "LARGEST",
    "RIDGE",
    "SHARE",
    "SMALLEST",
    "THRESHOLD",
    "ZERO",
    "Allocation",
    "Curve",
    "Filter",
    "Forecast",
    "Leading",
    "LowRank",
    "Offer",
    "allocated",
    "alphaedit",
    "astra",
    "b_zero",
    "caught",
    "centred",
    "clora",
    "combined",
    "contrast",
    "corda",
    "corda_exact",
    "eva",
    "filtered",
    "inflora",
    "leading_inputs",
    "leading_outputs",
    "leading_singular",
    "lora_null",
    "mica",
    "mica_data",
    "milora",
    "olora_tail",
    "orthogonal",
    "overlap",
    "pissa",
    "sc_lora",
    "skipped",
    "spared",
    "svd_llm",
    "truncated",
]
