"""The names of experts' factors: in a model, in PEFT's patterns and in an adapter's file, where all experts share one A and one B.

A `ParamWrapper` of rank r on a parameter of E experts has one A (r · E, d_in) and one B (d_out, r · E): expert e has the rows
e·r … e·r + r − 1 of A, and of B every E-th column from the e-th on. PEFT nests the wrappers of one module: the parameter that comes
first in it has the inner one (`….experts.base_layer`), the last one the outer one (`….experts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key

from nullspace.errors import DamagedFileError, InputError
from nullspace.model.experts import FIRST, LAST, ExpertName, expert_of

# What a `ParamWrapper` puts between a module and its name.
INNER = ".base_layer"
# Beginnings of the versions of PEFT whose A and B of experts are laid out in another way.
OTHER_LAYOUT = ("0.17.", "0.18.")


def parameter_name(layer: str) -> str:
    """The name of the parameter that holds a layer's weight in the model: for an expert's matrix, that of all experts."""
    expert = expert_of(layer)
    return f"{layer}.weight" if expert is None else expert.stack


def pattern_name(layer: str) -> str:
    """The name of a layer that PEFT compares with `rank_pattern` and `alpha_pattern`: for an expert's matrix, the parameter's."""
    expert = expert_of(layer)
    return layer if expert is None else expert.stack


def layers_by_parameter(layers: Iterable[str]) -> dict[str, list[str]]:
    """Parameter → the layers whose weights it holds; experts in their order."""
    held: dict[str, list[str]] = {}
    for name in layers:
        held.setdefault(parameter_name(name), []).append(name)
    return {name: sorted(each, key=_number) for name, each in held.items()}


def _number(name: str) -> int:
    expert = expert_of(name)
    return 0 if expert is None else expert.number


def part_of_a(a: torch.Tensor, count: int, index: int) -> torch.Tensor:
    """(r, d_in): one expert's rows, a view of A (r · count, d_in)."""
    return a.view(count, -1, a.shape[1])[index]


def part_of_b(b: torch.Tensor, count: int, index: int) -> torch.Tensor:
    """(d_out, r): one expert's columns, a view of B (d_out, r · count)."""
    return b.view(len(b), -1, count)[:, :, index]


def stacked(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r · E, d_in) and B (d_out, r · E) of the A (r, d_in) and B (d_out, r) of all E experts, in their order."""
    return torch.cat([a for a, _ in parts]), torch.stack([b for _, b in parts], dim=-1).flatten(1)


class Place(NamedTuple):
    """Where an adapter's file has the factors of a layer."""

    path: str
    """The tensors are `base_model.model.{path}.lora_A.weight` and `….lora_B.weight`."""
    experts: int = 1
    """The number of experts that share them."""
    number: int | None = None
    """Of the expert; None for a layer of its own."""

    def of_a(self, a: torch.Tensor) -> torch.Tensor:
        """A (r, d_in) of this layer, from the file's tensor."""
        return a if self.number is None else part_of_a(a.contiguous(), self.experts, self.number)

    def of_b(self, b: torch.Tensor) -> torch.Tensor:
        """B (d_out, r), likewise."""
        return b if self.number is None else part_of_b(b.contiguous(), self.experts, self.number)


def places(config: Mapping[str, Any], rows: Mapping[str, int], where: Any) -> dict[str, Place]:
    """Name of the layer → where its factors are, for all layers of a saved adapter.

    Args:
        config: the content of the adapter's configuration file.
        rows: path in the file → rows of its A.
        where: the adapter's directory, for messages.

    Raises:
        ValueError: naming the module, if the file's experts are not those of the configuration, or of PEFT before 0.19.
    """
    modules: dict[str, list[str]] = {}
    for path in rows:
        modules.setdefault(path.replace(INNER, ""), []).append(path)
    found = {}
    for module, paths in modules.items():
        wanted = _parameters(config, module)
        if not wanted:
            found.update({path: Place(path) for path in paths})
            continue
        paths.sort(key=len, reverse=True)  # the innermost wrapper is that of the first parameter
        if len(paths) != len(wanted) or (len(wanted) > 1 and not {*wanted} <= {*FIRST, LAST}):
            raise DamagedFileError(
                f"{where}: the adapter of {module!r} has {len(paths)} pairs of A and B, and its configuration names the parameters "
                f"{', '.join(wanted)}"
            )
        for parameter, path in zip(wanted, paths, strict=True):
            found.update(_experts(config, ExpertName(module, parameter, 0), path, rows[path], where))
    return found


def layout_of(layers: Iterable[str]) -> dict[str, list[str]]:
    """Path in the file → the layers whose factors it holds: one, or all experts of a parameter, in their order."""
    modules: dict[str, dict[str, list[str]]] = {}
    layout: dict[str, list[str]] = {}
    for parameter, names in layers_by_parameter(layers).items():
        expert = expert_of(names[0])
        if expert is None:
            layout[names[0]] = names
        else:
            modules.setdefault(expert.experts, {})[parameter] = names
    for module, stacks in modules.items():
        order = sorted(stacks, key=lambda name: (name.endswith(f".{LAST}"), name))
        layout |= {module + INNER * depth: stacks[parameter] for depth, parameter in enumerate(reversed(order))}
    return layout


def _parameters(config: Mapping[str, Any], module: str) -> list[str]:
    """The parameters of a module that are adapted as experts, in the order in which transformers' classes have them."""
    own = set()
    for target in config.get("target_parameters") or ():
        parameter = target.rpartition(".")[2]
        # A bare name would else take a linear layer of this name for a module with such a parameter.
        if parameter not in ("weight", module.rpartition(".")[2]) and _ends_with(f"{module}.{parameter}", target):
            own.add(parameter)
    return sorted(own, key=lambda name: (name == LAST, name))


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _experts(config: Mapping[str, Any], first: ExpertName, path: str, rows: int, where: Any) -> dict[str, Place]:
    rank = rank_in(config, first.stack)
    if rows % rank:
        raise DamagedFileError(f"{where}: the A of {first.stack!r} has {rows} rows, no multiple of its rank {rank}")
    version = str(config.get("peft_version") or "")
    if version.startswith(OTHER_LAYOUT):
        raise InputError(
            f"{where}: the adapter of {first.stack!r} was saved by PEFT {version}, which laid out the factors of experts in "
            "another way than 0.19 and later: train it again"
        )
    count = rows // rank
    return {str(first._replace(number=index)): Place(path, count, index) for index in range(count)}


def rank_in(config: Mapping[str, Any], name: str) -> int:
    """The rank that a configuration gives a layer, or the experts of a parameter."""
    ranks: dict[str, int] = config.get("rank_pattern") or {}
    return int(ranks.get(get_pattern_key(list(ranks), name), config["r"]))
