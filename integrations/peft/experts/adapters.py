"""Adapters of experts that are stored as one tensor: PEFT's `ParamWrapper`, seen as one adapter for each expert's matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn

from nullspace.integrations.peft.experts.layout import INNER, part_of_a, part_of_b
from nullspace.model.experts import ExpertMatrix, ExpertName, stacks_of
from nullspace.model.linear import is_linear


class _Part:
    """One expert's A or B of one adapter, in the place of a linear layer: `weight` is a view of the stacked weight."""

    def __init__(self, module: nn.Module, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.module, self._view = module, view

    @property
    def weight(self) -> torch.Tensor:
        weight: Any = self.module.weight
        return self._view(weight)

    def requires_grad_(self, flag: bool = True) -> None:
        """Of the factor of all experts."""
        self.module.requires_grad_(flag)


class _Parts(Mapping[str, _Part]):
    """Adapter → one expert's A or B."""

    def __init__(self, modules: Any, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._modules, self._view = modules, view

    def __getitem__(self, adapter: str) -> _Part:
        return _Part(self._modules[adapter], self._view)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


class ExpertAdapter:
    """One expert's share of a `ParamWrapper`, with the attributes of PEFT's `LoraLayer` that are used here.

    Writing to `lora_A[adapter].weight` or `lora_B[adapter].weight` writes to the wrapper. Freezing concerns all experts.

    Args:
        wrapper: PEFT's, of the parameter of all experts.
        path: its name in the base model, with the parts that PEFT has added.
        base: the expert's matrix.
    """

    fan_in_fan_out = False
    lora_magnitude_vector: Mapping[str, Any] = {}
    lora_embedding_A: Mapping[str, Any] = {}

    def __init__(self, wrapper: ParamWrapper, path: str, base: ExpertMatrix) -> None:
        self.wrapper, self.path, self._base = wrapper, path, base
        count, index = wrapper.num_experts, base.index
        self.lora_A = _Parts(wrapper.lora_A, lambda a: part_of_a(a, count, index))
        self.lora_B = _Parts(wrapper.lora_B, lambda b: part_of_b(b, count, index))
        self.in_features, self.out_features = base.in_features, base.out_features

    def get_base_layer(self) -> ExpertMatrix:
        return self._base

    @property
    def r(self) -> dict[str, int]:
        """Adapter → rank of one expert's factors."""
        return self.wrapper.r

    @property
    def scaling(self) -> dict[str, float]:
        return self.wrapper.scaling

    @property
    def active_adapters(self) -> list[str]:
        return self.wrapper.active_adapters

    @property
    def merged_adapters(self) -> list[str]:
        return self.wrapper.merged_adapters

    @property
    def frozen_peft_weight_names(self) -> dict[str, tuple[str, ...]]:
        return self.wrapper.frozen_peft_weight_names

    @frozen_peft_weight_names.setter
    def frozen_peft_weight_names(self, names: dict[str, tuple[str, ...]]) -> None:
        self.wrapper.frozen_peft_weight_names = names


def stack_of(path: str, layer: LoraLayer) -> ExpertName | None:
    """The first expert's name under the parameter that a wrapper adapts; None for a layer of another kind.

    Args:
        path: the wrapper's name in the base model.
        layer: any of PEFT's.
    """
    base = layer.get_base_layer()
    if not isinstance(layer, ParamWrapper) or is_linear(base) or layer.parameter_name not in stacks_of(base):
        return None
    return ExpertName(path.replace(INNER, ""), layer.parameter_name, 0)


def expert_adapters(path: str, layer: LoraLayer) -> dict[str, ExpertAdapter]:
    """Name of the matrix → adapter, of all experts of one wrapper; empty for a layer of another kind."""
    first = stack_of(path, layer)
    if first is None or not isinstance(layer, ParamWrapper):
        return {}
    names = [first._replace(number=index) for index in range(layer.num_experts)]
    matrices = [ExpertMatrix(layer.get_base_layer(), *name) for name in names]
    return {str(name): ExpertAdapter(layer, path, matrix) for name, matrix in zip(names, matrices, strict=True)}


def adapted_by(layer: Any) -> Any:
    """The module of PEFT's that holds an adapter's factors: the layer itself or, of an expert's matrix, the wrapper."""
    return layer.wrapper if isinstance(layer, ExpertAdapter) else layer
