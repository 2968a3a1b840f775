"""`nullspace init`: from a model to an adapter and its base."""

from __future__ import annotations

import functools
import platform
import time
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import nullspace
from nullspace.checks import FRACTION, NOT_NEGATIVE, check_between, check_integer, check_real
from nullspace.cli import console, options, together
from nullspace.cli.calibrate import Calibration, reserved, row_spaces
from nullspace.cli.data import DATA, WEIGHTS, Text, described
from nullspace.cli.options import (
    Condition,
    Layers,
    Loading,
    RunningForSpaces,
    Shown,
    ShownTable,
    method_of,
    needed,
    of_methods,
    one_of,
    option,
)
from nullspace.errors import AdapterWarning, InputError

if TYPE_CHECKING:
    from nullspace.model.sites import Targets


METHODS = (
    *("lora-null", "b-zero", "contrast", "inflora", "corda-kpm", "corda-ipm", "corda-exact", "astra", "sc-lora"),
    *("milora", "pissa", "olora-tail", "mica", "mica-data", "eva", "orthogonal"),
)
_check_fraction = functools.partial(check_real, allowed=FRACTION)
_check_not_negative = functools.partial(check_real, allowed=NOT_NEGATIVE)


def _learns_without(factor: str) -> Condition:
    """Methods that learn something where this factor is frozen: not those that start with it at zero."""
    name = f"freeze_{factor.lower()}"
    return needed(
        f"methods that do not start with {factor} = 0", lambda values: not (values[name] and method_of(values).zero == factor)
    )


@dataclass(frozen=True)
class Source:
    """What `init` starts from."""

    PANEL: ClassVar[str] = "Data"

    data: list[str] | None = DATA
    weights: str | None = WEIGHTS
    spaces: Path | None = option("Use these null spaces (of `nullspace compute`) instead of --data.", None)
    covariances: Path | None = options.COVARIANCES
    partial: bool = options.PARTIAL


@dataclass(frozen=True)
class Adapter:
    """The adapter, and the method that gives it its first values."""

    PANEL: ClassVar[str] = "Adapter"

    rank: int = options.RANK
    rank_budget: int | None = option(
        "As many trained parameters as this rank in every layer has, where they buy most; --rank is then the largest of a layer.",
        None,
        check_integer,
        needed("methods whose objective is a sum over directions: all but 'orthogonal'", lambda v: method_of(v).shares is not None),
    )
    alpha: float | None = option("LoRA's alpha; the rank by default, so that the scaling is 1.", None, check_real)
    use_rslora: bool = option("Scale by alpha / sqrt(rank).", False)
    method: str = option(
        "How the adapter begins; contrast keeps most, with covariances of the task and of what must be kept (--preserve). "
        "contrast, inflora, b-zero, mica, mica-data, eva and orthogonal leave the base alone.",
        "lora-null",
        one_of(*METHODS),
    )
    sigma_scale: float = option(
        "lora-null: multiply the adapter's product (the paper's Table 5).", 1.0, check_real, of_methods("sigma_scale")
    )
    preserve: Path | None = option(
        "contrast, inflora, sc-lora: covariances of what must not be forgotten; --data is then the task.",
        None,
        needs=needed("'contrast', 'inflora' and 'sc-lora'", lambda values: "preserve" in method_of(values).needs),
    )
    beta: float = option("sc-lora: 0 for the task alone, 1 for preservation alone.", 0.5, _check_fraction, of_methods("beta"))
    damping: float = option(
        "corda, contrast: added to the diagonal of C (contrast: of --preserve), relative to its mean.",
        0.01,
        _check_not_negative,
        of_methods("damping"),
    )
    share: float = option(
        "inflora: of the inputs of --preserve, the share that A reads nothing of.", 0.99, _check_fraction, of_methods("share")
    )
    factor_split: float = option(
        "A takes so many times its share of the adapter's product, and B as much less.", 1.0, check_real, of_methods("split")
    )
    window: float | None = option(
        "milora, corda-exact, astra: which singular triples: 0 the largest, 1 the smallest, 0.5 those in the middle. By default 1; "
        "for astra 0.",
        None,
        _check_fraction,
        of_methods("window"),
    )
    freeze_a: bool | None = option(
        "B alone is trained, from zero on the original model, so that no base is written; by default for contrast and inflora.",
        None,
        needs=_learns_without("A"),
    )
    freeze_b: bool | None = option(
        "A alone is trained, from zero on the original model, so that no base is written; by default for mica and mica-data.",
        None,
        needs=_learns_without("B"),
    )
    residual: str = option(
        "What subtracts the adapter's initial product: 'base' (OUT/base), 'adapter' (a second, frozen one, OUT/subtracted) or "
        "'auto': none with --freeze-a or --freeze-b, else the base where it can be changed.",
        "auto",
        one_of("auto", "base", "adapter"),
        needed("methods that change the base", lambda values: method_of(values).changes_base),
    )
    avoid: list[Path] | None = options.AVOID

    def numbers(self) -> dict[str, Any]:
        """The numbers of `nullspace.methods.OPTIONS`, by their names there."""
        own = {name: getattr(self, name) for name in ("sigma_scale", "beta", "damping", "share")}
        return {**own, "split": self.factor_split, **({} if self.window is None else {"window": self.window})}


def init(
    *,
    model: str = options.MODEL,
    out: Path = option("Directory for adapter/, base/ and spaces/; must not exist yet."),
    source: Source,
    text: Text,
    adapter: Adapter,
    layers: Layers,
    loading: Loading,
    running: RunningForSpaces,
    shown: ShownTable,
) -> dict[str, Any] | None:
    """From a model and a text to a LoRA adapter in the text's null space (or of another method), and its residual base."""
    from nullspace import NullSpaces
    from nullspace.artifacts.checkpoint import COVARIANCES
    from nullspace.integrations import peft
    from nullspace.methods import METHODS as ENTRIES
    from nullspace.methods import frozen_factor
    from nullspace.model.coverage import covered_share

    began = time.perf_counter()
    method, frozen = ENTRIES[adapter.method], frozen_factor(adapter.method, adapter.freeze_a, adapter.freeze_b)
    _check_sources(source, adapter, method.needs)
    if source.data is None and not together.is_first():
        return None
    with reserved(out, shown, running, calibrates=source.data is not None) as checkpoint:
        inputs = _Inputs.load(source, adapter)
        with console.Bars(shown.quiet) as progress:
            mixture = None if source.data is None else text.mixture(source.data, source.weights)
            calibration = Calibration(loading.of(model), layers, running, checkpoint, progress)
            if mixture is not None:
                calibration.read(mixture, text)
            calibration.open(adapter.rank, None if mixture is None else text.length)
            inputs.leave_out_others(calibration.targets)
            peft.fit_config(_peft_config(calibration, adapter), calibration.model, calibration.targets)
            residual = peft.check_servable(
                calibration.model,
                calibration.targets,
                adapter.method,
                residual=adapter.residual,
                freeze_a=frozen == "A",
                freeze_b=frozen == "B",
                offloaded=True,
            )
            _warn_of_neighbour(adapter)
            if mixture is not None:
                if "spaces" in method.needs:
                    inputs.spaces = calibration.spaces(adapter.rank, inputs.avoided, running.spectrum)
                else:
                    inputs.covariances = calibration.covariances(checkpoint / COVARIANCES, overwrite=True)
                if not together.is_first():
                    return None
            else:
                if "spaces" in method.needs and inputs.spaces is None:
                    how: dict[str, Any] = {"rank": adapter.rank, "spectrum": running.spectrum, "avoid": inputs.avoided}
                    inputs.spaces = NullSpaces.from_covariances(inputs.covariances, **how, progress=progress)
                calibration.targets.settle(calibration.model)
            record = _write_init(out, calibration, _origin(source, text), adapter, inputs, shown)
        share = covered_share(calibration.model, calibration.targets)
        facts = {"out": str(out), **record, "model": model, "covered_share": share, "seconds": time.perf_counter() - began}
        if inputs.spaces is not None:
            document = console.show_spaces(inputs.spaces, facts, as_json=shown.as_json, quiet=shown.quiet, all_rows=shown.all_rows)
        else:
            document = {**facts, "layers": len(calibration.targets)} if shown.as_json else None
        if not (shown.as_json or shown.quiet):
            if inputs.spaces is None:
                console.print_line(f"{share:.1%} of the parameters in the model's matrices have adapters.\n")
            console.print_line(_next_steps(out, calibration, residual, frozen))
    return document


def _peft_config(calibration: Calibration, adapter: Adapter) -> Any:
    """PEFT's configuration for the targets."""
    from peft import LoraConfig

    alpha: Any = adapter.rank if adapter.alpha is None else adapter.alpha  # PEFT declares int, and takes any number
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        use_rslora=adapter.use_rslora,
        target_modules=list(calibration.targets),
        task_type="CAUSAL_LM" if type(calibration.model).__name__.endswith("ForCausalLM") else None,
        revision=calibration.base.revision,  # of the untouched base: a residual base is a folder, which has none
    )


def _check_sources(source: Source, adapter: Adapter, needs: Collection[str]) -> None:
    """Raise `ValueError` unless what is given is what the method needs."""
    from nullspace.methods import Sources, check_method

    sources = [("--data", source.data), ("--spaces", source.spaces), ("--covariances", source.covariances)]
    given = [name for name, value in sources if value is not None]
    if not needs and given:
        raise InputError(f"method {adapter.method!r} looks at the weights alone: leave out {given[0]}")
    if needs and (len(given) != 1 or (source.spaces is not None and "spaces" not in needs)):
        more = " and --spaces" if "spaces" in needs else f" for {adapter.method!r}"
        raise InputError(f"give one of --data, --covariances{more}")
    if adapter.preserve is None and "preserve" in needs:
        raise InputError(f"{adapter.method!r} needs --preserve")
    check_method(adapter.method, Sources(**adapter.numbers()))
    if adapter.rank_budget is not None:
        check_between("--rank-budget", adapter.rank_budget, adapter.rank, " (--rank, the largest rank of a layer)")


def _warn_of_neighbour(adapter: Adapter) -> None:
    """Warn where a default has a cheaper setting beside it that keeps more: LoRA-Null whose A is trained since nothing was said."""
    is_default = adapter.freeze_a is None and not adapter.freeze_b and adapter.residual == "auto" and adapter.factor_split == 1.0
    if adapter.method == "lora-null" and is_default and together.is_first():
        warnings.warn(
            "A is trained too (LoRA-Null v1): --freeze-a (v2) forgot less at equal learning (docs/results.md), writes no base and "
            f"exports rank {adapter.rank} instead of {2 * adapter.rank}; with examples of the task, --method contrast keeps most. "
            "--no-freeze-a trains A without this warning",
            AdapterWarning,
            stacklevel=2,
        )


@dataclass
class _Inputs:
    """What a method makes its factors of: loaded, or computed later."""

    avoided: dict[str, Any] | None
    covariances: Any
    preserved: Any
    spaces: Any

    @classmethod
    def load(cls, source: Source, adapter: Adapter) -> _Inputs:
        """What is given as files."""
        from nullspace import Covariances, NullSpaces

        return cls(
            row_spaces(adapter.avoid),
            None if source.covariances is None else Covariances.load(source.covariances, partial=source.partial),
            None if adapter.preserve is None else Covariances.load(adapter.preserve, partial=source.partial),
            None if source.spaces is None else NullSpaces.load(source.spaces),
        )

    def leave_out_others(self, targets: Targets) -> None:
        """Leave out the targets that one of them does not have."""
        for known in (each for each in (self.spaces, self.covariances, self.preserved) if each is not None):
            for name in [name for name in targets if name not in known]:
                targets.leave_out(name, "is none of the layers of --spaces, --covariances or --preserve")


def _write_init(
    out: Path, calibration: Calibration, origin: dict[str, Any], adapter: Adapter, inputs: _Inputs, shown: Shown
) -> dict[str, Any]:
    """Write adapter, base and null spaces. Returns the record of how they were made."""
    from nullspace.integrations import peft
    from nullspace.methods import METHODS as ENTRIES

    config = _peft_config(calibration, adapter)
    numbers = adapter.numbers()
    method = ENTRIES[adapter.method]
    record = {
        "revision": calibration.base.revision,
        **origin,
        "rank": adapter.rank,
        "alpha": config.lora_alpha,
        "use_rslora": adapter.use_rslora,
        "method": adapter.method,
        **{name: value for name, value in numbers.items() if name in method.options},
        **{name: True for name in ("load_in_4bit", "load_in_8bit") if getattr(calibration.running, name)},
        "versions": _versions(),
    }
    peft.write_init(
        out,
        calibration.model,
        config,
        inputs.spaces,
        method=adapter.method,
        covariances=None if "spaces" in method.needs else inputs.covariances,
        preserve=inputs.preserved,
        freeze_a=adapter.freeze_a,
        freeze_b=adapter.freeze_b,
        residual=adapter.residual,
        rank_budget=adapter.rank_budget,
        **numbers,
        tokenizer=calibration.tokenizer,
        record={**record, "model": calibration.base.name},
        overwrite=shown.overwrite,
        progress=calibration.progress,
    )
    return record


def _origin(source: Source, text: Text) -> dict[str, Any]:
    """What the record says of the data."""
    if source.data is None:
        return {"data": None if source.covariances is None else str(source.covariances)}
    return {"data": described(source.data, source.weights), **text.record()}


def _next_steps(out: Path, calibration: Calibration, residual: str, frozen: str | None) -> str:
    base = str(out / "base") if residual == "base" else calibration.base.name
    running, kind = calibration.running, type(calibration.model).__name__
    automatic = "AutoModelForCausalLM" if kind.endswith("ForCausalLM") else kind
    config = "load_in_8bit=True"
    if running.load_in_4bit:
        dtype = calibration.model.config.quantization_config.bnb_4bit_compute_dtype
        config = f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype={dtype}'
    quantised = f", quantization_config=BitsAndBytesConfig({config})" if running.load_in_4bit or running.load_in_8bit else ""
    doors = "nullspace.integrations.peft"
    second = f"    {doors}.attach_subtracted(model, {str(out / 'subtracted')!r})\n" if residual == "adapter" else ""
    alone = {"A": f"    {doors}.freeze_a(model)  # train B alone\n", "B": f"    {doors}.freeze_b(model)  # train A alone\n"}
    return (
        f"\nWrote {out}. To train it:\n\n"
        f"    base = {automatic}.from_pretrained({base!r}{quantised})\n"
        f"    model = PeftModel.from_pretrained(base, {str(out / 'adapter')!r}, is_trainable=True)\n"
        f"{second}{alone.get(frozen or '', '')}\n"
        f"and afterwards, for the untouched base: nullspace export TRAINED --initial {out} --out EXPORTED"
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    others = {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")}
    return {"python": platform.python_version(), "nullspace-lora": nullspace.__version__, **others}
