"""The inputs that EVA sums: tokens of a language model, or the rows that the caller's functions make."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import EvaConfig, LoraConfig
from torch import nn

from nullspace.calibration.input_sums import InputSums
from nullspace.errors import InputError, InputTypeError
from nullspace.model.padding import Padding, PaddingReader
from nullspace.model.token_rows import TokenRows

PrepareLayerInputs = Callable[..., torch.Tensor] | Mapping[str, Callable[..., torch.Tensor]] | None


class Tokens(InputSums):
    """Sums the inputs of a language model, without padding and without the tokens that labels leave out."""

    MASKED = "every token is masked, as padding or by its label: EvaConfig(use_label_mask=False) counts the latter"

    def __init__(self, layers: Mapping[str, nn.Module], precision: str, eva: EvaConfig, model: nn.Module) -> None:
        super().__init__(layers, precision, TokenRows(model))
        self._eva, self._model, self._reader = eva, model, PaddingReader(model)

    def begin(self, number: int, batch: Any, inputs: Any) -> None:
        """Begin a batch: masks and labels are read as the loader gave them, and `inputs` are what the model gets."""
        if not isinstance(batch, Mapping):
            raise InputTypeError(
                f"batch {number} is {type(batch).__name__}, not a mapping, in which the default functions would look for "
                "attention_mask and labels: give prepare_model_inputs_fn and prepare_layer_inputs_fn"
            )
        padding = self._reader.read(number, batch)
        self._reader.check_positions(self._model, inputs, padding)
        labels = batch.get("labels") if self._eva.use_label_mask else None
        if labels is not None:
            labelled = labels != self._eva.label_mask_value
            shape = (padding.decoder or padding).shape
            if shape != labelled.shape:
                raise InputError(
                    f"batch {number}: labels {tuple(labelled.shape)} cannot be lined up with the tokens {shape}: use "
                    "EvaConfig(use_label_mask=False)"
                )
            padding = padding.keep(labelled)
        self.begin_batch(number, padding)


class PreparedRows(InputSums):
    """Sums, in place of a layer's input, the rows that the caller's function makes of it.

    Args:
        layers: module name → linear layer.
        precision: as in `stream_covariances`.
        config: handed to `prepare_model_inputs`.
        prepare_model_inputs, prepare_layer_inputs: of `get_eva_state_dict`.

    Raises:
        ValueError: naming them, for names in `prepare_layer_inputs` that are not among the layers.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        precision: str,
        config: LoraConfig,
        prepare_model_inputs: Callable[[Any, LoraConfig], Any] | None,
        prepare_layer_inputs: PrepareLayerInputs,
    ) -> None:
        super().__init__(layers, precision)
        self._config, self._prepare_model_inputs = config, prepare_model_inputs
        if isinstance(prepare_layer_inputs, Mapping):
            self._functions = {name: prepare_layer_inputs.get(name, _every_row) for name in layers}
            unknown = [name for name in prepare_layer_inputs if name not in layers]
            if unknown:
                raise InputError(
                    "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
                    + ", ".join(map(repr, unknown))
                )
        else:
            self._functions = dict.fromkeys(layers, prepare_layer_inputs or _every_row)
        self._model_inputs: Any = None
        self._latest: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def begin(self, number: int, batch: Any, inputs: Any) -> None:
        """Begin a batch of which the model gets `inputs`."""
        prepare = self._prepare_model_inputs
        self._model_inputs = copy.deepcopy(inputs) if prepare is None else prepare(inputs, self._config)
        self.begin_batch(number, Padding())

    def receive(self, name: str, x: torch.Tensor) -> None:
        rows = self._functions[name]((x,), self._model_inputs, name)
        if not isinstance(rows, torch.Tensor) or rows.ndim != 2:
            what = f"a tensor of shape {tuple(rows.shape)}" if isinstance(rows, torch.Tensor) else type(rows).__name__
            raise InputError(f"{name}: prepare_layer_inputs_fn must return a tensor (n, d_in), not {what}")
        # The function knows layers' names. Layers with one input tensor share a sum only if it makes equal rows for them.
        if self._latest is None or self._latest[0] is not x:
            self._latest = (x, [])
        known = self._latest[1]
        equal = next((each for each in known if torch.equal(each, rows)), None)
        if equal is None:
            known.append(rows)
        super().receive(name, rows if equal is None else equal)

    def end_batch(self) -> None:
        self._latest = None
        super().end_batch()


def _every_row(layer_input: tuple[torch.Tensor], model_input: Any, layer_name: str) -> torch.Tensor:
    return layer_input[0].reshape(-1, layer_input[0].shape[-1])
