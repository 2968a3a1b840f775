"""What PEFT's adapters of experts cannot do: refused by name, before a calibration where it is known by then."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from torch import nn

from nullspace.errors import InputError, ResourceUseWarning
from nullspace.integrations.peft.experts.layout import layers_by_parameter, parameter_name
from nullspace.model.experts import ExpertMatrix, ExpertName, expert_of, is_transposed
from nullspace.model.sharded_tensors import is_sharded, shape_of
from nullspace.model.sites import Targets
from nullspace.planning.units import gigabytes

# Fields of `LoraConfig` that a `ParamWrapper` refuses.
REFUSED = (
    "lora_dropout",
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "use_qalora",
    "use_bdlora",
)


def check_experts(config: LoraConfig, layers: Targets) -> None:
    """Check what PEFT gives an adapter of experts. It needs no weights: call it before a calibration.

    Raises:
        ValueError: naming the option that PEFT refuses for experts, or a parameter of which only some experts are wanted.
    """
    for parameter, names in layers_by_parameter(name for name in layers if expert_of(name)).items():
        matrix: Any = layers[names[0]]
        count, module = shape_of(matrix.stack)[0], matrix.experts_name.rpartition(".")[2]
        option = next((name for name in REFUSED if getattr(config, name, None)), None)
        if option is not None:
            raise InputError(
                f"LoraConfig.{option}={getattr(config, option)!r}: PEFT has no such thing for experts that are one tensor "
                f"({parameter!r}). Leave the option out, or leave out the experts: exclude='experts' (--exclude experts) for the "
                f"calibration, exclude_modules=[{module!r}] in the LoraConfig"
            )
        if len(names) < count:
            missing = next(index for index in range(count) if str(ExpertName(*_stack(matrix), index)) not in layers)
            raise InputError(
                f"PEFT gives all {count} experts of {parameter!r} an adapter or none, and {len(names)} of them are wanted "
                f"(the first without is number {missing}): name all of them, or leave the parameter out"
            )
        if count == 1 and is_transposed(matrix.experts):
            layers.leave_out(names[0], "gets no adapter from PEFT, which computes a single transposed expert in another layout")


def _stack(matrix: ExpertMatrix) -> tuple[str, str]:
    return matrix.experts_name, matrix.parameter


def leave_out_experts(layers: Targets, why: str) -> None:
    """Leave experts' matrices out of `"all-linear"`, for what cannot serve them: `ValueError` if the user has asked for one."""
    for name in [name for name in layers if expert_of(name)]:
        layers.leave_out(name, why)


def refuse_sharded_experts(layers: Mapping[str, nn.Module]) -> None:
    """Raise `ValueError`, naming the parameter, if an expert's matrix is spread over several ranks."""
    for name, layer in layers.items():
        if isinstance(layer, ExpertMatrix) and is_sharded(layer.stack):
            raise InputError(
                f"{parameter_name(name)!r} is spread over several ranks, and PEFT's adapters of experts need it whole: call "
                "write_init, which gathers it, and load what it writes; or leave the experts out (exclude_modules)"
            )


def warn_of_two(layers: Mapping[str, nn.Module], *, stacklevel: int) -> None:
    """`UserWarning` that two active adapters of experts cost PEFT memory: the changes of all experts of a parameter at once."""
    held = {parameter_name(name): layer.stack for name, layer in layers.items() if isinstance(layer, ExpertMatrix)}
    if held:
        name = max(held, key=lambda each: held[each].numel())
        size = gigabytes(held[name].numel() * held[name].element_size())
        warnings.warn(
            "two adapters are active on experts, so that PEFT computes the changes of all experts of a parameter at every call "
            f"({size} for {name!r}, and once more in the backward pass), which it does not with one adapter. export_lora makes "
            "one of both; residual='base' and methods that leave the base alone need only one.",
            ResourceUseWarning,
            stacklevel=stacklevel + 1,
        )
