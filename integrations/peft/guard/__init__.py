"""Hold what must be kept while an adapter trains: constraints, penalties, a decay towards the start, and a gauge.

- `confine` (`constraints.confine`): A changes only in directions in which the inputs to be kept are small.
- `oplora` (`constraints.oplora`): what A and B add stays out of the leading directions of inputs and outputs.
- `penalty`, `clora` (`penalty`): Σ ‖ΔW X‖² / ‖W₀ X‖², or Σ ‖A P‖² + ‖Bᵀ Q‖², as a term of the loss.
- `overlap` (`overlap`): Σ |A A_iᵀ| with the A of earlier adapters as a term of the loss (O-LoRA).
- `decay_to_start` (`decay`): weight decay towards A₀ and B₀.
- `Gauge`, `drift_of` (`gauge`): ‖ΔW X‖ / ‖W₀ X‖ of every layer of a live adapter, without a forward pass.
- `ForgettingCallback` (`callback`): drift and KL to the base in a Trainer's logs and in the adapter's card, and a budget.
"""

from nullspace.integrations.peft.guard.callback import ForgettingCallback, Reading
from nullspace.integrations.peft.guard.constraints.confine import confine
from nullspace.integrations.peft.guard.constraints.confinement import Confinement
from nullspace.integrations.peft.guard.constraints.directions import Allowed
from nullspace.integrations.peft.guard.constraints.oplora import oplora
from nullspace.integrations.peft.guard.decay import StartDecay, decay_to_start
from nullspace.integrations.peft.guard.gauge import Drift, Gauge, drift_of
from nullspace.integrations.peft.guard.overlap import overlap
from nullspace.integrations.peft.guard.penalty import clora, penalty

__all__ = [
    "Allowed",
    "Confinement",
    "Drift",
    "ForgettingCallback",
    "Gauge",
    "Reading",
    "StartDecay",
    "clora",
    "confine",
    "decay_to_start",
    "drift_of",
    "oplora",
    "overlap",
    "penalty",
]
