"""`nullspace init`, `compute` and `covariances`: a model is run on data, or covariances take the place of that."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nullspace
from nullspace.cli import console, options, together
from nullspace.cli.interrupts import Terminated
from nullspace.cli.options import Adapter, Layers, Running, RunningForSpaces, Shown, Text, option
from nullspace.progress import Progress

if TYPE_CHECKING:
    from nullspace.artifacts.covariances import Covariances
    from nullspace.artifacts.spaces import NullSpaces
    from nullspace.model.sites import Targets


def _parse_shard(text: str) -> tuple[int, int]:
    from nullspace.artifacts.shard_account import parse_shard

    return parse_shard(text)


@dataclass(frozen=True)
class Source:
    """Where `compute` gets its covariances from."""

    data: str | None = options.DATA
    covariances: Path | None = options.COVARIANCES
    partial: bool = options.PARTIAL


@dataclass(frozen=True)
class InitSource:
    """What `init` starts from."""

    data: str | None = options.DATA
    spaces: Path | None = option("Use these null spaces (of `nullspace compute`) instead of --data.", None)
    covariances: Path | None = options.COVARIANCES
    partial: bool = options.PARTIAL


@dataclass(frozen=True)
class LayersToKeep(Layers):
    """Which covariances `covariances` keeps, and how exactly."""

    precision: str = options.PRECISION._replace(default="fp64")
    keep: str = options.KEEP
    shard: str | None = option(
        "'i/n': every n-th batch from the i-th on, for `nullspace merge` with the others, 1/n to n/n.",
        None,
        options.parsed(_parse_shard),
    )


def init(
    *,
    model: str = options.MODEL,
    out: Path = option("Directory for adapter/, base/ and spaces/; must not exist yet."),
    source: InitSource,
    text: Text,
    adapter: Adapter,
    layers: Layers,
    running: RunningForSpaces,
    shown: Shown,
) -> dict[str, Any] | None:
    """From a model and a text to a LoRA adapter in the text's null space (or of another method), and its residual base."""
    from nullspace import NullSpaces
    from nullspace.artifacts.checkpoint import COVARIANCES
    from nullspace.methods import METHODS

    began = time.perf_counter()
    method = METHODS[adapter.method]
    _check_sources(source, adapter, method.needs)
    if source.data is None and not together.is_first():
        return None
    with _reserved(out, shown, running, calibrates=source.data is not None) as checkpoint:
        inputs = _Inputs.load(source, adapter)
        with console.Bars(shown.quiet) as progress:
            calibration = _Calibration(model, layers, running, checkpoint, progress)
            calibration.open(adapter.rank, None if source.data is None else text.length)
            inputs.leave_out_others(calibration.targets)
            calibration.check_adaptable(adapter)
            if source.data is not None:
                calibration.read(source.data, text)
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
            record = _write_init(out, calibration, source, adapter, inputs, shown)
        facts = {"out": str(out), **record, "model": model, "seconds": time.perf_counter() - began}
        if inputs.spaces is not None:
            document = console.show_spaces(inputs.spaces, facts, as_json=shown.as_json, quiet=shown.quiet)
        else:
            document = {**facts, "layers": len(calibration.targets)} if shown.as_json else None
        if not (shown.as_json or shown.quiet):
            console.print_line(_next_steps(out, out / "base" if method.changes_base else model))
    return document


def compute(
    *,
    out: Path = option("Directory for the null spaces; must not exist yet."),
    model: str | None = option("Hub name, folder, or .gguf file; none with --covariances.", None, typed=()),
    source: Source,
    text: Text,
    rank: int = options.RANK,
    avoid: list[Path] | None = options.AVOID,
    layers: Layers,
    running: RunningForSpaces,
    shown: Shown,
) -> dict[str, Any] | None:
    """Only the null spaces: for `nullspace init --spaces`, or `NullSpaces.load`."""
    from nullspace import Covariances, NullSpaces

    began = time.perf_counter()
    if source.covariances is None and (model is None or source.data is None):
        raise ValueError("give MODEL and --data, or --covariances")
    if source.covariances is not None and (model is not None or source.data is not None):
        raise ValueError("--covariances needs neither MODEL nor --data: leave them out")
    if source.data is None and not together.is_first():
        return None
    with _reserved(out, shown, running, calibrates=source.covariances is None) as checkpoint:
        avoided = _row_spaces(avoid)
        with console.Bars(shown.quiet) as progress:
            if source.covariances is not None:
                sums = Covariances.load(source.covariances, partial=source.partial)
                spaces = NullSpaces.from_covariances(sums, rank=rank, spectrum=running.spectrum, avoid=avoided, progress=progress)
            else:
                calibration = _Calibration(str(model), layers, running, checkpoint, progress)
                calibration.open(rank, text.length)
                calibration.read(str(source.data), text)
                spaces = calibration.spaces(rank, avoided, running.spectrum)
        if not together.is_first():
            return None
        spaces.save(out, overwrite=shown.overwrite)
        data = source.data if source.covariances is None else str(source.covariances)
        facts = {"out": str(out), "model": model, "data": data, "seconds": time.perf_counter() - began}
        return console.show_spaces(spaces, facts, as_json=shown.as_json, quiet=shown.quiet)


def covariances(
    *,
    model: str = options.MODEL,
    data: str = option("A file or a hub data set.", check=options.check_file),
    out: Path = option("Directory for the second moments; must not exist yet."),
    text: Text,
    layers: LayersToKeep,
    running: Running,
    shown: Shown,
) -> dict[str, Any] | None:
    """Keep the second moments themselves, for any method and rank later, or to be merged with those of other data."""
    began = time.perf_counter()
    with _reserved(out, shown, running, calibrates=True) as checkpoint:
        part = None if layers.shard is None else _parse_shard(layers.shard)
        with console.Bars(shown.quiet) as progress:
            calibration = _Calibration(model, layers, running, checkpoint, progress)
            calibration.open(None, text.length)
            calibration.read(data, text)
            sums = calibration.covariances(out, keep=layers.keep, shard=part, overwrite=shown.overwrite)
        if not together.is_first():
            return None
        facts = {"out": str(out), "model": model, "data": data, "seconds": time.perf_counter() - began}
        return console.show_covariances(sums, facts, as_json=shown.as_json, quiet=shown.quiet)


@contextlib.contextmanager
def _reserved(out: Path, shown: Shown, running: Running, *, calibrates: bool) -> Iterator[Path]:
    """Context manager: inside, no other run writes to OUT. What is in the way of OUT or of its checkpoint is an error at once.

    Of several processes that calibrate together, the first one holds OUT; its errors are raised on all.

    Yields:
        OUT.checkpoint, where a calibration keeps what it has finished. It is deleted when the command is done; an interruption gets
        an argument that says how to go on with it.
    """
    from nullspace.artifacts import checkpoint, store
    from nullspace.distributed import Job

    job = Job() if calibrates else Job.alone()
    place = Path(os.path.abspath(out))
    directory = place.with_name(f"{place.name}.checkpoint")
    with contextlib.ExitStack() as held:
        with job.sharing_errors():
            if job.first:
                held.enter_context(store.reserved(out, overwrite=shown.overwrite))
                if calibrates:
                    checkpoint.check_place(directory)
        job.exchange(None)
        try:
            yield directory
        except (KeyboardInterrupt, Terminated) as end:
            sites = checkpoint.sites_in(directory) if calibrates else 0
            command = "the same command without --fresh" if running.fresh else "the same command"
            if sites:
                end.args = (f"{directory} has {sites} finished sites, and {command} goes on behind them",)
            raise
        if calibrates and job.first:
            checkpoint.delete(directory)


# ---- a calibration


@dataclass
class _Calibration:
    """A model, the data that it is run on, and how."""

    name: str
    layers: Layers
    running: Running
    checkpoint: Path
    progress: Progress
    model: Any = None
    tokenizer: Any = None
    targets: Any = None
    batches: Any = None

    def open(self, rank: int | None, length: int | None) -> None:
        """Load the model and find its targets. Sequences longer than the model takes are an error before its weights are read."""
        from nullspace.integrations.transformers import read_config
        from nullspace.model.sites import find_targets

        is_gguf = Path(self.name).suffix == ".gguf"  # whose configuration takes as long to read as its weights
        if length is not None and not is_gguf:
            check_length(read_config(self.name), self.name, length)
        running = self.running
        self.model, self.tokenizer = load_model(self.name, running.dtype, running.device, running.offload, self.progress)
        if length is not None and is_gguf:
            check_length(self.model.config, self.name, length)
        targets, exclude = options.parse_targets(self.layers.targets), options.parse_exclude(self.layers.exclude)
        self.targets = find_targets(self.model, targets, exclude=exclude, rank=rank)

    def check_adaptable(self, adapter: Adapter) -> None:
        """Raise if PEFT cannot adapt a target, or the method cannot serve one."""
        from nullspace.integrations import peft

        config = self.peft_config(adapter)
        peft.fit_config(config, self.model, self.targets)
        peft.check_servable(self.model, self.targets, adapter.method, offloaded=True)

    def peft_config(self, adapter: Adapter) -> Any:
        """PEFT's configuration for the targets."""
        from peft import LoraConfig

        alpha: Any = adapter.rank if adapter.alpha is None else adapter.alpha  # PEFT declares int, and takes any number
        return LoraConfig(
            r=adapter.rank,
            lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
            use_rslora=adapter.use_rslora,
            target_modules=list(self.targets),
            task_type="CAUSAL_LM" if type(self.model).__name__.endswith("ForCausalLM") else None,
        )

    def read(self, data: str, text: Text) -> None:
        """Read the data and cut them into batches."""
        from nullspace.integrations.transformers import PackedBatches, load_texts

        self.progress("data", 0, 1, 0)
        texts = load_texts(data, field=text.field, split=text.split)
        self.batches = PackedBatches(texts, self.tokenizer, samples=text.samples, length=text.length, batch_size=text.batch_size)
        self.progress("data", 1, 1, 0)

    def spaces(self, rank: int, avoided: dict[str, Any] | None, spectrum: bool) -> NullSpaces:
        """The null spaces of all targets."""
        from nullspace import compute_null_spaces

        if avoided is not None:  # an earlier adapter may have been on more layers
            avoided = {name: rows for name, rows in avoided.items() if name in self.targets}
        return compute_null_spaces(self.model, self.batches, **self._arguments(), rank=rank, spectrum=spectrum, avoid=avoided)

    def covariances(
        self, out: Path, *, overwrite: bool, keep: str = "float64", shard: tuple[int, int] | None = None
    ) -> Covariances:
        """The covariances of all targets, written to `out`."""
        import torch

        from nullspace import compute_covariances

        dtype = getattr(torch, keep)
        return compute_covariances(
            self.model, self.batches, out, **self._arguments(), dtype=dtype, shard=shard, overwrite=overwrite
        )

    def _arguments(self) -> dict[str, Any]:
        """How the model is run. The calibration begins now; with --fresh, without what an earlier run has kept."""
        from nullspace.artifacts import checkpoint

        if self.running.fresh and together.is_first():
            checkpoint.delete(self.checkpoint)
        return {
            "targets": self.targets,
            "strategy": self.running.strategy,
            "hidden_states": self.running.hidden_states,
            "precision": self.layers.precision,
            "checkpoint": self.checkpoint,
            "progress": self.progress,
        }


def load_model(name: str, dtype: str, device: str | None, offload: bool, progress: Progress) -> tuple[Any, Any]:
    """A model and its tokenizer, with a bar."""
    from nullspace.integrations import transformers

    progress("model", 0, 1, 0)
    loaded = transformers.load_model(name, dtype=dtype, device=device, offload=offload)
    progress("model", 1, 1, 0)
    return loaded


def check_length(config: Any, name: str, length: int) -> None:
    """Raise `ValueError` for sequences that are longer than the positions of a model."""
    from nullspace.integrations.transformers import positions

    limit = positions(config)
    if limit is not None and length > limit:
        raise ValueError(
            f"--length {length} is more than the {limit} positions that {name} has: give at most {limit}, or scale its rotary "
            "embeddings in its config.json if it has any"
        )


def _row_spaces(adapters: list[Path] | None) -> dict[str, Any] | None:
    if not adapters:
        return None
    from nullspace.integrations.peft import row_spaces

    return row_spaces(*adapters)


# ---- what `init` starts from, and what it writes


def _check_sources(source: InitSource, adapter: Adapter, needs: Collection[str]) -> None:
    """Raise `ValueError` unless what is given is what the method needs."""
    sources = [("--data", source.data), ("--spaces", source.spaces), ("--covariances", source.covariances)]
    given = [name for name, value in sources if value is not None]
    if not needs and given:
        raise ValueError(f"method {adapter.method!r} looks at the weights alone: leave out {given[0]}")
    if needs and (len(given) != 1 or (source.spaces is not None and "spaces" not in needs)):
        more = " and --spaces" if "spaces" in needs else f" for {adapter.method!r}"
        raise ValueError(f"give one of --data, --covariances{more}")
    if adapter.preserve is None and "preserve" in needs:
        raise ValueError(f"{adapter.method!r} needs --preserve")


@dataclass
class _Inputs:
    """What a method makes its factors of: loaded, or computed later."""

    avoided: dict[str, Any] | None
    covariances: Any
    preserved: Any
    spaces: Any

    @classmethod
    def load(cls, source: InitSource, adapter: Adapter) -> _Inputs:
        """What is given as files."""
        from nullspace import Covariances, NullSpaces

        return cls(
            _row_spaces(adapter.avoid),
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
    out: Path, calibration: _Calibration, source: InitSource, adapter: Adapter, inputs: _Inputs, shown: Shown
) -> dict[str, Any]:
    """Write adapter, base and null spaces. Returns the record of how they were made."""
    from nullspace.integrations import peft
    from nullspace.methods import METHODS

    config = calibration.peft_config(adapter)
    numbers: dict[str, Any] = {name: getattr(adapter, name) for name in ("sigma_scale", "beta", "damping")}
    method = METHODS[adapter.method]
    record = {
        "data": source.data or (str(source.covariances) if source.covariances else None),
        "rank": adapter.rank,
        "alpha": config.lora_alpha,
        "use_rslora": adapter.use_rslora,
        "method": adapter.method,
        **{name: value for name, value in numbers.items() if name in method.options},
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
        **numbers,
        tokenizer=calibration.tokenizer,
        record={**record, "model": calibration.name},
        overwrite=shown.overwrite,
        progress=calibration.progress,
    )
    return record


def _next_steps(out: Path, base: Path | str) -> str:
    return (
        f"\nWrote {out}. To train it:\n\n"
        f"    base = AutoModelForCausalLM.from_pretrained({str(base)!r})\n"
        f"    model = PeftModel.from_pretrained(base, {str(out / 'adapter')!r}, is_trainable=True)\n\n"
        f"and afterwards, for the untouched base: nullspace export TRAINED --initial {out} --out EXPORTED"
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    others = {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")}
    return {"python": platform.python_version(), "nullspace-lora": nullspace.__version__, **others}
