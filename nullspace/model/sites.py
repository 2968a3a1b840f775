"""Which linear layers, and which of them share one input.

A *target* is a linear layer that the user asked for, under its name in `model.named_modules()`, or one expert's matrix, under the
name that `nullspace.model.experts` gives it. A *site* is one input: its *members* are the targets that are handed the very same
tensor (q, k and v; gate and up), so one sum serves them all.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from nullspace.checks import check_integer
from nullspace.errors import InputError, InputTypeError, TargetWarning
from nullspace.model.coverage import listed_by_kind, matrices, why_no_layer
from nullspace.model.experts import expert_of, holds_experts, named_layers
from nullspace.model.layer_names import is_attention, is_mlp
from nullspace.model.linear import is_linear, is_of_class, output_head, weight_shape
from nullspace.model.wrappers import unwrap


@dataclass(frozen=True)
class Site:
    """One input of the model and the linear layers that receive it.

    Attributes:
        members: names of the layers, in the order in which they were called.
        d_in: width of the input.
    """

    members: tuple[str, ...]
    d_in: int

    @property
    def name(self) -> str:
        """The first member's name, which stands for the site."""
        return self.members[0]

    def __str__(self) -> str:
        return self.name


class Targets(dict[str, nn.Module]):
    """Module name → linear layer, in the model's order, and what `"all-linear"` leaves out.

    Args:
        layers: name → layer.
        optional: whether a layer that turns out to be no target is left out (`"all-linear"`); otherwise it is an error.
        excluded: names that the user has excluded.
        left_out: name → why it is left out. Selections made by `only` share it.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        optional: bool = False,
        excluded: Iterable[str] = (),
        left_out: dict[str, str] | None = None,
    ) -> None:
        super().__init__(layers)
        self.optional = optional
        self.excluded = frozenset(excluded)
        self.left_out: dict[str, str] = {} if left_out is None else left_out

    def only(self, names: Iterable[str]) -> Targets:
        """The targets of these names, in the model's order."""
        wanted = set(names)
        some = {name: module for name, module in self.items() if name in wanted}
        return Targets(some, optional=self.optional, excluded=self.excluded, left_out=self.left_out)

    def of_twin(self, modules: Mapping[str, nn.Module]) -> Targets:
        """The same names in another model."""
        twins = {name: modules[name] for name in self}
        return Targets(twins, optional=self.optional, excluded=self.excluded, left_out=self.left_out)

    def leave_out(self, name: str, why: str) -> None:
        """Remove a layer that cannot be a target: `ValueError` if the user has asked for it."""
        if not self.optional:
            raise InputError(f"target {name!r} {why}. Leave it out of targets")
        self.left_out[name] = why
        self.pop(name, None)

    def refuse_empty(self) -> None:
        """Raise `ValueError`, with the first reason, if all layers are left out."""
        if not self and self.left_out:
            name, why = next(iter(self.left_out.items()))
            raise InputError(f"'all-linear' leaves no layer: {name!r} {why} (the first of {len(self.left_out)})")

    def settle(self, model: nn.Module, *, warn: bool = True, stacklevel: int = 3) -> None:
        """Remove the layers that selections made by `only` have left out, and warn once of what `"all-linear"` leaves out.

        Args:
            model: the model of the layers.
            warn: whether to warn.
            stacklevel: of the warning.

        Raises:
            ValueError: if no layer is left.

        Warns:
            UserWarning: naming layers that were left out, and other matrices (experts that are one tensor) from 1 % of the
                parameters on; with their share of the parameters of all matrices but embeddings and output head.
        """
        if not self.optional:
            return
        for name in self.left_out:
            self.pop(name, None)
        self.refuse_empty()
        if not warn:
            return
        reasons = dict(self.left_out)
        modules = named_layers(unwrap(model))
        every = matrices(model, modules)
        sizes = {name: size for name, size in every if not self.excluded & {name, name.rpartition(".")[0]}}
        others = {name: size for name, size in sorted(sizes.items(), key=lambda each: -each[1]) if name not in modules}
        total = sum(sizes.values())
        if sum(others.values()) >= NOTEWORTHY * total:
            reasons.update({name: why_no_layer(modules[name.rpartition(".")[0]]) for name in others})
        if reasons:
            missed = sum(size for name, size in sizes.items() if name in reasons or name in others) / max(total, 1)
            warnings.warn(
                f"'all-linear' leaves out {listed_by_kind(reasons)}. {missed:.2%} of the parameters in the model's matrices "
                "(embeddings and output head aside) are left out in all.",
                TargetWarning,
                stacklevel=stacklevel,
            )


# Matrices that are no linear layers cause a warning from this share of the parameters on.
NOTEWORTHY = 0.01


def find_targets(
    model: nn.Module,
    targets: str | Iterable[str] = "all-linear",
    *,
    exclude: str | Iterable[str] | None = None,
    rank: int | None = None,
) -> Targets:
    """The linear layers (`nn.Linear`, transformers' `Conv1D`, those of quantisation libraries, experts' matrices) of `targets`.

    Args:
        model: any module; wrappers are removed, from it and from its parts (`nullspace.model.wrappers`).
        targets: `"all-linear"`: every linear layer but the output head, layers that are registered under two names, and, where a
            rank is given, layers smaller than that. `"attention"`, `"mlp"`, `"experts"`: those of them that are in attention
            modules, in feed-forward modules (experts included), or routed experts. Another string: a regular expression that must
            match a whole name. A list: names, or endings of names behind a dot (`"q_proj"`), as PEFT's `target_modules` and
            `target_parameters` (`"experts.down_proj"`: of all experts).
        exclude: layers to take away: an expression or a list, as for `targets`; the words may be in a list too.
        rank: of the adapters; None if it is not known yet.

    Returns:
        Module name → layer, in the model's own order; never empty. What `"all-linear"` leaves out is in its `left_out`.

    Raises:
        ValueError: if an entry, or the expression, matches nothing or a module that is not linear, if `exclude` takes nothing or
            everything away, if a layer that was asked for is registered under two names, if the rank does not fit a layer
            (of `"all-linear"`: layers with half of the parameters), or if the model carries an adapter of PEFT's.
        TypeError: if `exclude` is a mapping.
    """
    if isinstance(targets, Targets):
        return targets
    model = unwrap(model)
    modules = named_layers(model)  # a layer's second name is no typing error
    adapter = next((name for name, module in modules.items() if _carries_adapter(module)), None)
    if adapter is not None:
        raise InputError(f"the model already carries a LoRA adapter or another of PEFT's ({adapter!r}); merge or unload it first")
    optional = targets == "all-linear"
    if optional:
        head = output_head(model)
        layers = {name: m for name, m in modules.items() if name and is_linear(m) and m is not head}
        if not layers:
            raise InputError(f"'all-linear': {type(model).__name__} has no linear layer")
    elif isinstance(targets, str) and targets in KINDS:
        layers = {name: m for name, m in modules.items() if name and is_linear(m) and KINDS[targets](name)}
        if not layers:
            held = [m for m in modules.values() if targets == "experts" and holds_experts(m)]
            why = "".join(f" What it holds {reason}." for reason in dict.fromkeys(map(why_no_layer, held)))
            raise InputError(f"targets={targets!r}: {type(model).__name__} has no such layer.{why} {_names(modules)}")
    elif isinstance(targets, str):
        layers = _match_expression(modules, targets)
    else:
        layers = _match_endings(modules, list(targets))
    excluded = _excluded(model, layers, exclude, optional)
    chosen = Targets({name: m for name, m in layers.items() if name not in excluded}, optional=optional, excluded=excluded)
    if not chosen:
        raise InputError(f"exclude={exclude!r} takes away all of targets={targets!r}: no layer is left")
    _leave_out_repeated(modules, chosen)
    chosen.refuse_empty()
    if rank is not None:
        _leave_out_small(chosen, rank)
    return chosen


KINDS: Mapping[str, Callable[[str], bool]] = {
    "attention": is_attention,
    "mlp": is_mlp,
    "experts": lambda name: expert_of(name) is not None,
}
"""Words for kinds of layers, by their names."""


def ends_with(name: str, ending: str) -> bool:
    """Whether a layer's name is `ending`, or ends so behind a dot; an expert's matrix also without its index."""
    return any(each == ending or each.endswith(f".{ending}") for each in (name, name.partition("[")[0]))


def check_rank(layers: Mapping[str, nn.Module], rank: int) -> None:
    """Raise `ValueError`, naming the layer, if a basis of `rank` columns does not fit it."""
    check_integer("rank", rank)
    for name, layer in layers.items():
        d_out, d_in = weight_shape(layer)
        if rank >= d_in:
            raise InputError(f"rank {rank} does not leave {name!r} (d_in = {d_in}) any input: it must be below d_in")
        if rank > d_out:
            raise InputError(
                f"rank {rank} is larger than the weight of {name!r} ({d_out} × {d_in}) allows: choose rank ≤ {d_out}, or leave "
                "the layer out of targets"
            )


def _carries_adapter(module: nn.Module) -> bool:
    return is_of_class(module, "BaseTunerLayer", "peft.tuners.tuners_utils")


def _match_expression(modules: dict[str, nn.Module], expression: str) -> dict[str, nn.Module]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise InputError(f"targets={expression!r} is not a regular expression ({error}); for one name, use a list") from None
    matched = {name: m for name, m in modules.items() if name and pattern.fullmatch(name)}
    linear = {name: m for name, m in matched.items() if is_linear(m)}
    if not linear:
        what = f"matches only modules that are not linear, such as {next(iter(matched))!r}" if matched else "matches no module"
        raise InputError(
            f"targets={expression!r} {what}. A string is a regular expression for whole module names, "
            f"such as {_example(modules)!r}; for endings of names, use a list. {_names(modules)}"
        )
    return linear


def _match_endings(modules: dict[str, nn.Module], endings: list[str]) -> dict[str, nn.Module]:
    if not endings:
        raise InputError("targets is empty")
    wanted: set[str] = set()
    for ending in endings:
        matched = [name for name in modules if name and ends_with(name, ending)]
        if not matched:
            last_parts = {_last_part(name) for name, m in modules.items() if is_linear(m)}
            close = difflib.get_close_matches(ending.rpartition(".")[2], sorted(last_parts), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise InputError(f"target {ending!r} matches no module.{hint} {_names(modules)}")
        wrong = next((name for name in matched if not is_linear(modules[name])), None)
        if wrong is not None:
            raise InputError(f"target {ending!r} matches {wrong!r}, which is {type(modules[wrong]).__name__}, not a linear layer")
        wanted.update(matched)
    return {name: m for name, m in modules.items() if name in wanted}


def _excluded(
    model: nn.Module, layers: Mapping[str, nn.Module], exclude: str | Iterable[str] | None, optional: bool
) -> frozenset[str]:
    """Names that `exclude` matches: of targets and, beside `"all-linear"`, of other matrices, which it would warn of."""
    if exclude is None:
        return frozenset()
    if isinstance(exclude, Mapping):
        raise InputTypeError("exclude names layers; rows that a basis is to be orthogonal to (row_spaces) belong to avoid=")
    names = list(dict.fromkeys([*layers, *(name for name, _ in matrices(model))] if optional else layers))
    if isinstance(exclude, str) and exclude in KINDS:
        exclude = [exclude]
    if isinstance(exclude, str):
        try:
            pattern = re.compile(exclude)
        except re.error as error:
            raise InputError(f"exclude={exclude!r} is not a regular expression ({error}); for one name, use a list") from None
        matched = [name for name in names if pattern.fullmatch(name)]
        if not matched:
            raise InputError(
                f"exclude={exclude!r} matches no target. A string is a regular expression for whole module names, such as "
                f"{_example(layers)!r}; for endings of names, use a list. {_names(layers)}"
            )
        return frozenset(matched)
    endings = list(exclude)
    if not endings:
        raise InputError("exclude is empty: leave it out")
    matched = []
    for ending in endings:
        own = [name for name in names if (KINDS[ending](name) if ending in KINDS else ends_with(name, ending))]
        if not own:
            raise InputError(f"exclude: {ending!r} matches no target. {_names(layers)}")
        matched += own
    return frozenset(matched)


def _leave_out_repeated(modules: Mapping[str, nn.Module], chosen: Targets) -> None:
    """An adapter would replace a layer under one of its names only."""
    names: dict[int, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(id(module), []).append(name)
    for name, module in list(chosen.items()):
        others = [other for other in names[id(module)] if other != name]
        if others and name in chosen:
            chosen.leave_out(
                name,
                f"and {others[0]!r} are the same layer registered twice: an adapter would replace only one of them; give each "
                "place its own layer",
            )


def _leave_out_small(chosen: Targets, rank: int) -> None:
    """Layers that a basis of so many columns does not fit; if that is half of the model, the rank is what is wrong."""
    if not chosen.optional:
        check_rank(chosen, rank)
        return
    rank = check_integer("rank", rank)
    sizes = {name: math.prod(weight_shape(layer)) for name, layer in chosen.items()}
    small = [name for name, layer in chosen.items() if rank > weight_shape(layer)[0] or rank >= weight_shape(layer)[1]]
    if 2 * sum(sizes[name] for name in small) >= sum(sizes.values()):
        check_rank(chosen, rank)
    for name in small:
        d_out, d_in = weight_shape(chosen[name])
        chosen.leave_out(name, f"({d_out} × {d_in}) is smaller than rank {rank} asks for")


def _names(modules: Mapping[str, nn.Module]) -> str:
    last_parts = list(dict.fromkeys(_last_part(name) for name, m in modules.items() if name and is_linear(m)))
    return f"Linear layers here end in: {', '.join(last_parts[:20])}."


def _last_part(name: str) -> str:
    return name.rpartition(".")[2].partition("[")[0]


def _example(modules: Mapping[str, nn.Module]) -> str:
    last = next((name.rpartition(".")[2] for name, m in modules.items() if name and is_linear(m)), "q_proj")
    return rf".*\.{last}"
