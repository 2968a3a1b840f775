"""`confine`: while an adapter trains, its A changes only in directions in which the inputs to be kept are small."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from peft import PeftModel
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.spaces import NullSpaces
from nullspace.checks import FRACTION, check_real
from nullspace.errors import AdapterWarning, InputError, PrecisionWarning
from nullspace.integrations.peft.guard.adapted import Adapted, adapted_layers, check_known, start_of
from nullspace.integrations.peft.guard.directions import (
    Allowed,
    Damping,
    Projection,
    check_enough,
    damping_of,
    projection_of,
)
from nullspace.integrations.peft.guard.local import put, read
from nullspace.integrations.peft.guard.optimizers import innermost
from nullspace.integrations.peft.origin import freeze_recorded
from nullspace.model.sharded import reshard_model
from nullspace.model.sharded_tensors import whole
from nullspace.model.sites import Site
from nullspace.model.wrappers import unwrap
from nullspace.progress import Progress, reporter
from nullspace.solvers import decompose

# Of a row's norm: less than this left by a projection is rounding.
_NOTHING = 1e-5


def confine(
    peft_model: PeftModel,
    directions: Covariances | NullSpaces,
    leak: float = 0.02,
    *,
    damping: float | None = None,
    adapter_name: str | None = None,
    optimizer: Any = None,
    progress: bool | Progress = False,
) -> Confinement:
    """Keep the changes of an adapter's A, while it trains, in directions in which the inputs to be kept are small.

    After every optimizer step A ← A_ref + (A − A_ref) P with P = U_k U_kᵀ, U_k the k directions of the smallest inputs: as many as
    have a joint leak √(Σ λ / tr C) within the budget, and at least as many as the rank. Whatever the optimizer does,
    ‖(A − A_ref) X‖ ≤ ‖A − A_ref‖ · leak · ‖X‖. B trains freely. The result is a plain adapter.

    - Where B is zero (plain LoRA), A itself is projected at once, and its rows get their norms back: the model is unchanged, as
      B A = 0, and all that A ever reads is in these directions.
    - Where B is not zero, only the change of A is confined: A_ref is A now, and what A_ref reads remains (choose a start whose A
      reads little, such as `"lora-null"`).
    - An A that does not train (`freeze_a`, or so recorded in the adapter's configuration) is left as it is.

    Three ways to use it, which may be combined, as projecting twice is projecting once:

        confine(model, covariances, optimizer=optimizer)                   # a hook of this optimizer
        Trainer(model, args, callbacks=[confine(model, covariances)])      # a callback
        with confine(model, covariances):                                  # whatever optimizer steps inside
            ...

    Args:
        peft_model: with the adapter, after `fully_shard` or `DistributedDataParallel` if these are used without a Trainer. If it is
            sharded (FSDP2, ZeRO), all ranks have to call this. Rows of a DTensor are projected where they are; under DeepSpeed's
            ZeRO 1–3 the float32 copy is gathered and written (use the callback, or call `project` after `engine.step()`).
        directions: second moments of the inputs to be kept, or null spaces, whose bases are used as far as they are within the
            budget (`rank=` of `compute_null_spaces` then limits k).
        leak: the budget, between 0 and 1.
        damping: τ > 0, in place of a budget: each step's change of A is multiplied by (I + C / (τ · tr C / d_in))⁻¹, so that
            directions of inputs far above τ times the mean are hardly changed. `leak` is then ignored. Needs covariances.
        adapter_name: of the adapter; by default the active one.
        optimizer: to hook into. Its own weight decay is confined too.
        progress: True for a bar over the sites while directions are computed, or a callable (`nullspace.progress.Progress`).

    Returns:
        The `Confinement`.

    Cost: a step, 4 · r · d_in · min(k, d_in − k) flops a layer (`damping`: 2 · r · d_in²). In memory, on the device of A,
    d_in · min(k, d_in − k) float32 numbers a site (`damping`: d_in²); q, k and v are one site. At first, 4/3 · d_in³ flops a site
    for covariances (9 · d_in³ more where k > d_in / 4).

    Raises:
        TypeError: if the model is no `PeftModel`; for numbers of another type.
        ValueError: naming the layer, if there is no second moment of its inputs, or that of another model, if it is not linear or
            uses DoRA; naming a site, if null spaces have fewer than r directions.

    Warns:
        UserWarning: if r directions are not within the budget at some sites, whose A is then confined to the r of the smallest
            inputs, with the leak that these have; if A does not train in some or all layers; if A is in 16 bits, whose rounding
            reads all directions.
    """
    leak = check_real("leak", leak, FRACTION)
    if damping is not None:
        damping = check_real("damping", damping)
    layers = adapted_layers(peft_model, adapter_name)
    freeze_recorded(peft_model, [layers[0].adapter])
    start = start_of(peft_model, layers)
    trained = [each for each in layers if not each.frozen]
    _warn(layers, trained)
    groups = check_known(directions, tuple(trained), start)
    ranks = {site: max(each.layer.r[each.adapter] for each in members) for site, members in groups.items()}
    report, sites = reporter(progress), {}
    for site, held in _directions_of(directions, groups, ranks, leak, damping):
        sites[site] = _Site(groups[site], *held)
        report("directions", len(sites), len(groups), 0)
    if damping is None:
        check_enough({site: made.allowed for site, made in sites.items()}, ranks, leak)
    confinement = Confinement(unwrap(peft_model), list(sites.values()))
    return confinement if optimizer is None else confinement.attach(optimizer)


def _directions_of(
    directions: Covariances | NullSpaces,
    groups: Mapping[Site, list[Adapted]],
    ranks: Mapping[Site, int],
    leak: float,
    damping: float | None,
) -> Iterator[tuple[Site, tuple[Projection | Damping, Allowed]]]:
    """Site by site, in the order of `groups`."""

    def solve(site: Site, known: Any) -> tuple[Projection | Damping, Allowed]:
        device = groups[site][0].a.device
        if damping is not None:
            return damping_of(site, known, damping, device)
        return projection_of(known, leak, ranks[site], device)

    pairs = ((site, directions[members[0].name]) for site, members in groups.items())
    if isinstance(directions, Covariances):
        yield from zip(groups, decompose(pairs, solve), strict=True)  # type: ignore[type-var]
    else:
        yield from ((site, solve(site, space)) for site, space in pairs)


class Confinement(TrainerCallback):
    """A constraint on an adapter in training, as `confine` returns it.

    Attributes:
        allowed: layer → `Allowed(directions, d_in, leak)`: k, d_in, and the joint leak of the k directions. Layers whose A does
            not train are left out.
    """

    def __init__(self, peft_model: PeftModel, sites: list[_Site]) -> None:
        self._model, self._sites = peft_model, sites
        self._handles: list[Any] = []
        self.allowed = MappingProxyType({each.name: site.allowed for site in sites for each in site.layers})
        for site in sites:
            site.begin()

    def project(self) -> None:
        """Take back what the steps since the last call have changed elsewhere. Collective under DeepSpeed's ZeRO."""
        if torch.distributed.is_initialized():
            reshard_model(self._model)
        for site in self._sites:
            site.project()

    def rebase(self) -> None:
        """Take A as it is now for the reference, after loading a checkpoint. A Trainer that resumes does this by itself.

        A run that was confined by the same directions before continues in them: its A has left its start in no other direction.
        """
        if torch.distributed.is_initialized():
            reshard_model(self._model)
        for site in self._sites:
            site.rebase()

    def attach(self, optimizer: Any) -> Confinement:
        """Project after every step of an optimizer, as long as `detach` is not called.

        Raises:
            ValueError: for one that is no `torch.optim.Optimizer` and wraps none: call `project` after its step.
        """
        self._handles.append(innermost(optimizer).register_step_post_hook(lambda *_: self.project()))
        return self

    def detach(self) -> None:
        """Remove the hooks of `attach` and of the `with` statement."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Confinement:
        if not self._handles:
            self._handles.append(register_optimizer_step_post_hook(self._after_any))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def _after_any(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(each.a) in stepped for site in self._sites for each in site.layers):
            self.project()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """transformers' Trainer: a checkpoint may have been loaded, and the model may have been sharded."""
        self.rebase()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """transformers' Trainer: after every step."""
        self.project()


class _Site:
    """The A's of one site, one below the other, and what they may change by."""

    def __init__(self, layers: list[Adapted], held: Projection | Damping, allowed: Allowed) -> None:
        self.layers, self.allowed = layers, allowed
        self._held, self._reference = held, torch.empty(0)
        self._rows: list[int] = []

    @torch.no_grad()
    def begin(self) -> None:
        for each, rows in zip(self.layers, self._read().split(self._rows), strict=True):
            if not bool(whole(each.b).any()):
                put(each.a, self._projected_start(each, rows))
        self.rebase()

    def _projected_start(self, each: Adapted, rows: torch.Tensor) -> torch.Tensor:
        inside = self._held(rows)
        before, after = (torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in (rows, inside))
        if bool((after <= _NOTHING * before).any()):
            raise InputError(
                f"layer {each.name!r}: a row of A has nothing in the {self.allowed.directions} directions that it is confined to. "
                "Start from another A, or allow more (leak)"
            )
        return inside * (before / after)

    def rebase(self) -> None:
        self._reference = self._read()

    @torch.no_grad()
    def project(self) -> None:
        now = self._read()
        confined = self._reference + self._held(now - self._reference)
        for each, rows in zip(self.layers, confined.split(self._rows), strict=True):
            put(each.a, rows)
        if isinstance(self._held, Damping):
            self._reference = confined

    def _read(self) -> torch.Tensor:
        """(Σ r, d_in): the rows of this rank."""
        parts = [read(each.a) for each in self.layers]
        self._rows = [len(part) for part in parts]
        return torch.cat(parts)


def _warn(layers: tuple[Adapted, ...], trained: list[Adapted]) -> None:
    frozen = [each.name for each in layers if each.frozen]
    if frozen:
        rest = f"{len(trained)} of {len(layers)} layers are confined" if trained else "there is nothing to confine"
        warnings.warn(
            f"A does not train (freeze_a) in {len(frozen)} layers, {frozen[0]!r} the first: {rest}", AdapterWarning, stacklevel=3
        )
    if any(each.a.dtype in (torch.float16, torch.bfloat16) for each in trained):
        warnings.warn(
            f"A is in {trained[0].a.dtype}, and what rounding adds to it reads all directions: keep the adapter in float32 "
            "(get_peft_model does so unless autocast_adapter_dtype=False) and the rest in 16 bits",
            PrecisionWarning,
            stacklevel=3,
        )
