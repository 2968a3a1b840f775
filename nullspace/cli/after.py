"""`nullspace filter`, `combine` and `verify`: after training, forget less, make one adapter of several, check the drift."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nullspace.checks import FRACTION, NOT_NEGATIVE, check_device, check_real
from nullspace.cli import console, options
from nullspace.cli.calibrate import Calibration
from nullspace.cli.data import Text, check_file
from nullspace.cli.failures import Unmet
from nullspace.cli.options import Layers, Loading, Running, Shown, needed, option
from nullspace.errors import InputError

if TYPE_CHECKING:
    from nullspace.integrations.peft import FilterPath
    from nullspace.integrations.transformers import ModelSource
    from nullspace.progress import Progress

_OUT = needed("--out", lambda values: values["out"] is not None)
_ADAPTER = needed("the directory of an adapter, not to two checkpoints", lambda values: len(values["what"]) == 1)
_COMPUTED = needed("--task-data or --keep-data", lambda values: (values["task_data"] or values["keep_data"]) is not None)


def _check_not_negative(name: str, value: float) -> None:
    check_real(name, value, NOT_NEGATIVE)


def _check_share(name: str, value: float) -> None:
    check_real(name, value)
    check_real(name, value, FRACTION)


STRENGTH = "μ ≥ 0: how much what must be kept counts beside the task."
KEPT = "what `nullspace covariances` or `merge` wrote."
TASK = f"Second moments of the task's inputs: {KEPT}"
TASKS = f"Second moments of the inputs of an adapter's task, once an adapter, in their order: {KEPT}"
KEEP = f"Second moments of what must be kept: {KEPT}"
BASE = "The untouched base: hub name or folder; by default that which the adapter names."
INITIAL = "What the adapter was trained from, if that was not zero and is not found: what `nullspace init` wrote."
NAME = "Of several adapters in one directory."
RIDGE = option("Added to the task's second moment, relative to its mean eigenvalue.", 1e-3, check_real)


@dataclass(frozen=True)
class Budget:
    """How strong a filter is to be: one of the first three."""

    PANEL: ClassVar[str] = "Strength"

    strength: float | None = option(STRENGTH, None, _check_not_negative, _OUT)
    drift: float | None = option(
        "The largest allowed median drift, ‖ΔW X‖ / ‖W₀ X‖ on what must be kept; reads the base's weights.", None, check_real, _OUT
    )
    retain: float | None = option("The smallest allowed median share of the task's response.", None, _check_share, _OUT)
    scale: float = option("Multiply the change by this after the filter.", 1.0, check_real)


@dataclass(frozen=True)
class Sources:
    """The second moments of the task and of what must be kept: kept ones, or those of data."""

    PANEL: ClassVar[str] = "Task and what must be kept"

    task: Path | None = option(TASK, None)
    keep: Path | None = option(KEEP, None)
    task_data: str | None = option("The task's data, for --task: run through the base model first.", None, check_file)
    keep_data: str | None = option("Data of what must be kept, for --keep: the same.", None, check_file)
    device: str | None = option(
        "Where the base model runs on data; CUDA if there is one by default.",
        None,
        options.parsed(check_device),
        options.both(_COMPUTED, options.PLACED),
    )
    device_map: str | None = options.DEVICE_MAP._replace(needs=_COMPUTED)
    attn: str | None = options.ATTN._replace(needs=_COMPUTED)


@dataclass(frozen=True)
class LoadingOfAdapter(Loading):
    """Which files the base of an adapter is loaded from."""

    revision: str | None = options.REVISION._replace(needs=_ADAPTER)
    trust_remote_code: bool = options.TRUST_REMOTE_CODE._replace(needs=_ADAPTER)


def filter(
    *,
    what: list[str] = option("The directory of an adapter; or two checkpoints, BASE and TUNED.", typed=()),
    out: Path | None = option("Directory for the result; must not exist yet. Without it, the path to choose by is shown.", None),
    sources: Sources,
    text: Text,
    budget: Budget,
    ridge: float = RIDGE,
    base: str | None = option(BASE, None, needs=_ADAPTER),
    loading: LoadingOfAdapter,
    initial: Path | None = option(INITIAL, None, needs=_ADAPTER),
    adapter_name: str | None = option(NAME, None, needs=_ADAPTER),
    overwrite: bool = options.OVERWRITE._replace(needs=_OUT),
    as_json: bool = options.JSON,
    quiet: bool = options.QUIET,
) -> dict[str, Any] | None:
    """Take back what a training has changed on what must be kept, and leave what it does on the task: no training, closed form."""
    from nullspace.integrations import peft

    chosen = {name: getattr(budget, name) for name in ("strength", "drift", "retain")}
    given = [name for name, value in chosen.items() if value is not None]
    if len(what) > 2:
        raise InputError(f"give one adapter, or two checkpoints (BASE TUNED), not {len(what)} directories")
    if out is not None and len(given) != 1:
        raise InputError("--out needs exactly one of --strength, --drift and --retain; without --out, the path is shown")
    is_adapter = len(what) == 1
    of_adapter: dict[str, Any] = {}
    if is_adapter:
        known = loading.of(base) if base else _base_at_hand(what[0], initial, adapter_name, loading)
        of_adapter = {"initial": initial, "base": known, "adapter_name": adapter_name}
    result = None
    with console.Bars(quiet) as progress, _moments(what, sources, text, of_adapter, loading, progress) as moments:
        common = {**of_adapter, "scale": budget.scale, "ridge": ridge, "progress": progress}
        if out is None:
            show: Any = peft.filter_path if is_adapter else peft.checkpoint_path
            path = show(*what, *moments, **common)
        else:
            do: Any = peft.filter_adapter if is_adapter else peft.filter_checkpoint
            result = do(*what, *moments, out, **chosen, **common, overwrite=overwrite)
            path = result.path
    if as_json:
        facts = {"out": str(out), "strength": result.strength, "rest": result.rest} if result is not None else {"out": None}
        return {**facts, **path.as_json()}
    if not quiet:
        _show(path, None if result is None else result.strength)
        if result is not None:
            console.print_line(f"\n{out}: strength {result.strength:.4g}")
        else:
            console.print_line("\nNothing is written: choose with --strength, --drift or --retain, and --out.")
    return None


def combine(
    *,
    adapters: list[Path] = option("Directories of the adapters, at least two.", typed=()),
    task: list[Path] = option(TASKS),
    keep: Path = option(KEEP),
    strength: float = option(STRENGTH, check=_check_not_negative),
    out: Path = option("Directory for the new adapter; must not exist yet."),
    rank: int | None = options.RANK._replace(help="Of the new adapter; by default the sum of the ranks.", default=None),
    ridge: float = RIDGE,
    base: str | None = option("Name of the untouched base; by default that which the adapters name.", None),
    shown: Shown,
) -> dict[str, Any] | None:
    """One adapter in place of several: each task is answered as by its own adapter, and what must be kept is changed little."""
    from nullspace.integrations import peft

    with console.Bars(shown.quiet) as progress:
        result = peft.combine_adapters(
            adapters,
            task,
            keep,
            out,
            strength=strength,
            rank=rank,
            ridge=ridge,
            base=base,
            overwrite=shown.overwrite,
            progress=progress,
        )
    if shown.as_json:
        return {**result._asdict(), "out": str(out), "strength": strength}
    if not shown.quiet:
        console.print_line(f"{out}: rank {result.rank}, {len(result.ranks)} layers, of {len(adapters)} adapters")
    return None


def verify(
    *,
    adapter: Path = option("Directory of the adapter.", typed=()),
    keep: Path = option(KEEP),
    drift: float = option("The largest allowed median drift.", check=check_real),
    worst: float | None = option("The largest allowed drift of any layer.", None, check_real),
    base: str | None = option(BASE, None),
    loading: Loading,
    initial: Path | None = option(INITIAL, None),
    adapter_name: str | None = option(NAME, None),
    as_json: bool = options.JSON,
    quiet: bool = options.QUIET,
) -> dict[str, Any] | None:
    """Whether an adapter keeps within a budget of drift, ‖ΔW X‖ / ‖W₀ X‖ on what must be kept: exit code 0, or 1 if not."""
    from nullspace.integrations import peft
    from nullspace.integrations.peft.filtering.changes import read_changes
    from nullspace.integrations.peft.filtering.drift import named_base

    with console.Bars(quiet) as progress:
        known: dict[str, Any] = {"initial": initial, "adapter_name": adapter_name}
        named = loading.of(base) if base else loading.over(named_base(read_changes(adapter, **known)))
        now = peft.adapter_drift(adapter, keep, named, **known, progress=progress)
    kept = now.median <= drift and (worst is None or now.worst <= worst)
    document = {"adapter": str(adapter), "within": kept, "budget": {"drift": drift, "worst": worst}, **now._asdict()}
    if not (as_json or quiet):
        limit = "" if worst is None else f", {worst:g} allowed"
        console.print_line(
            f"{'within' if kept else 'beyond'} the budget: drift {now.median:.4g} (median of {len(now.layers)} layers, {drift:g} "
            f"allowed), {now.worst:.4g} in the worst, {now.worst_layer}{limit}"
        )
    if not kept:
        raise Unmet(document if as_json else None)
    return document if as_json else None


def _base_at_hand(adapter: str, initial: Path | None, adapter_name: str | None, loading: Loading) -> ModelSource | None:
    """The untouched base that an adapter names, if it is on this machine: absolute drifts need its weights."""
    from nullspace.integrations.peft.filtering.changes import read_changes
    from nullspace.integrations.peft.filtering.drift import named_base
    from nullspace.integrations.peft.folders.checkpoints import local_folder, read_config

    stored = read_changes(adapter, initial=initial, adapter_name=adapter_name)
    base = loading.over(named_base(stored)) if stored.base else None
    folder = None if base is None else local_folder(base)
    quantised = {} if folder is None else read_config(folder).get("quantization_config") or {}
    return base if folder is not None and quantised.get("quant_method") in (None, "bitsandbytes") else None


@contextlib.contextmanager
def _moments(
    what: list[str], sources: Sources, text: Text, of_adapter: Mapping[str, Any], loading: Loading, progress: Progress
) -> Iterator[tuple[Any, Any]]:
    """Context manager: the second moments of the task and of what must be kept; those of data are computed first."""
    from nullspace.artifacts.locks import temporary_folder

    for name in ("task", "keep"):
        if (getattr(sources, name) is None) == (getattr(sources, f"{name}_data") is None):
            raise InputError(f"give one of --{name} and --{name}-data")
    made: dict[str, Any] = {"task": sources.task, "keep": sources.keep}
    if sources.task is not None and sources.keep is not None:
        yield sources.task, sources.keep
        return
    given = {name: getattr(sources, f"{name}_data") for name in made}
    mixtures = {name: text.mixture([data]) for name, data in given.items() if data is not None}
    with temporary_folder() as folder:
        calibration, batches = _base_of(what, sources, of_adapter, loading, progress), {}
        for name, mixture in mixtures.items():
            calibration.read(mixture, text)
            batches[name] = calibration.batches
        calibration.open(None, text.length)
        for name, calibration.batches in batches.items():
            made[name] = calibration.covariances(folder / name, overwrite=False)
        calibration.model = None
        yield made["task"], made["keep"]


def _base_of(what: list[str], sources: Sources, of_adapter: Mapping[str, Any], loading: Loading, progress: Progress) -> Calibration:
    """The base model, with the layers that are changed as its targets."""
    from nullspace.integrations.peft.filtering.changes import read_changes
    from nullspace.integrations.peft.filtering.drift import named_base

    source, targets = loading.of(what[0]), "all-linear"
    if len(what) == 1:
        stored = read_changes(what[0], **{**of_adapter, "base": of_adapter["base"] and of_adapter["base"].name})
        source, targets = of_adapter["base"] or loading.over(named_base(stored)), ",".join(stored.changes.factors)
    given = {"device": sources.device, "device_map": sources.device_map, "attn": sources.attn}
    running = Running(**{**options.defaults(Running), **given})
    layers = Layers(**{**options.defaults(Layers), "targets": targets, "precision": "fp64"})
    return Calibration(source, layers, running, None, progress)


def _show(path: FilterPath, chosen: float | None) -> None:
    """The path as a table."""
    rows = []
    for step in path.steps:
        row = {"strength": f"{step.strength:.4g}{' *' if step.strength == chosen else ''}"}
        if step.drift is not None:
            row |= {"drift": f"{step.drift:.3e}", "worst": f"{step.worst_drift:.3e}"}
        row |= {"left of it": f"{step.left:.1%}", "task's response": f"{step.response:.1%}", "worst layer": step.worst_layer}
        rows.append(row)
    console.print_table(rows)
