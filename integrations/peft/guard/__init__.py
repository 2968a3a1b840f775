"""Hold what must be kept while an adapter trains: a constraint, a penalty, a decay towards the start, and a gauge.

- `confine` (`confine`): A changes only in directions in which the inputs to be kept are small.
- `penalty` (`penalty`): Σ ‖ΔW X‖² / ‖W₀ X‖² as a term of the loss.
- `Gauge`, `drift_of` (`gauge`): ‖ΔW X‖ / ‖W₀ X‖ of every layer of a live adapter, without a forward pass.
"""

from nullspace.integrations.peft.guard.confine import Confinement, confine
from nullspace.integrations.peft.guard.directions import Allowed
from nullspace.integrations.peft.guard.gauge import Drift, Gauge, drift_of
from nullspace.integrations.peft.guard.penalty import penalty

__all__ = ["Allowed", "Confinement", "Drift", "Gauge", "confine", "drift_of", "penalty"]
