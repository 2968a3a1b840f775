"""`penalty`: how far an adapter moves the outputs on the inputs to be kept, as a term of a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel

from nullspace.artifacts.covariances import Covariances
from nullspace.integrations.peft.guard.adapted import Initial
from nullspace.integrations.peft.guard.gauge import Gauge
from nullspace.progress import Progress


def penalty(
    peft_model: PeftModel,
    covariances: Covariances,
    *,
    adapter_name: str | None = None,
    initial: Initial = None,
    progress: bool | Progress = False,
) -> Callable[[], torch.Tensor]:
    """A function that returns Σ ‖ΔW X‖² / ‖W₀ X‖² over the adapter's layers, for a loss: `loss + strength * hold()`.

    A sum and not a mean, as in the objective of `nullspace.factors.filtered`: a drift of 0.01 in each of 210 layers is 0.021.

    Args, errors: as `Gauge`.

    Returns:
        A function without arguments. Its value is a float32 scalar on the device of the first layer, with the gradients of A and B;
        it is collective if the adapter is sharded.

    Cost: that of a reading of `Gauge`, and twice as much for the gradient. An A that does not train is multiplied by the second
    moment once.
    """
    gauge = Gauge(peft_model, covariances, adapter_name=adapter_name, initial=initial, progress=progress)
    return lambda: gauge.squares().sum()
