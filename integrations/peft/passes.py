"""Forward passes of the caller's own making, for PEFT's functions that run the model themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from nullspace.calibration.input_sums import InputSums, leave_out_uncalled
from nullspace.calibration.recording import recording
from nullspace.model.batches import evaluating


@contextlib.contextmanager
def summing(model: nn.Module, layers: Mapping[str, nn.Module], sums: InputSums, targets: Mapping[str, nn.Module]) -> Iterator[None]:
    """Context manager: the caller runs the model, in eval mode and without gradients, and `sums` gets the inputs of its layers.

    Args:
        model: that the layers are parts of.
        layers: module name → linear layer.
        sums: gets the inputs.
        targets: the layers as the caller knows them. Those that were never called are left out of it at the end.

    Raises:
        ValueError: at the end, naming the layer, if one that was asked for by name was never called, was replaced or lost its hook.
    """
    with torch.inference_mode(False), torch.no_grad(), evaluating(model), recording(model, layers, sums):
        yield
    leave_out_uncalled(sums.uncalled, targets)
