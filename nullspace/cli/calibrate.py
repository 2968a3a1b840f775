"""`nullspace compute` and `covariances`; and a calibration as `init` needs it too: where it writes, its model and its data."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nullspace.cli import console, options, together
from nullspace.cli.data import ALONE, DATA, WEIGHTS, Text, described
from nullspace.cli.interrupts import Terminated
from nullspace.cli.options import Layers, Loading, Running, RunningForSpaces, Shown, ShownTable, option
from nullspace.errors import InputError
from nullspace.progress import Progress

if TYPE_CHECKING:
    from nullspace.artifacts.covariances import Covariances
    from nullspace.artifacts.spaces import NullSpaces
    from nullspace.integrations.transformers import Mixture, ModelSource


def _parse_shard(text: str) -> tuple[int, int]:
    from nullspace.artifacts.shard_account import parse_shard

    return parse_shard(text)


@dataclass(frozen=True)
class Source:
    """Where `compute` gets its covariances from."""

    PANEL: ClassVar[str] = "Data"

    data: list[str] | None = DATA
    weights: str | None = WEIGHTS
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


def compute(
    *,
    out: Path = option("Directory for the null spaces; must not exist yet."),
    model: str | None = option("Hub name, folder, or .gguf file; none with --covariances.", None, typed=()),
    source: Source,
    text: Text,
    rank: int = options.RANK,
    avoid: list[Path] | None = options.AVOID,
    layers: Layers,
    loading: Loading,
    running: RunningForSpaces,
    shown: ShownTable,
) -> dict[str, Any] | None:
    """Only the null spaces: for `nullspace init --spaces`, or `NullSpaces.load`."""
    from nullspace import Covariances, NullSpaces

    began = time.perf_counter()
    if source.covariances is None and (model is None or source.data is None):
        raise InputError("give MODEL and --data, or --covariances")
    if source.covariances is not None and (model is not None or source.data is not None):
        raise InputError("--covariances needs neither MODEL nor --data: leave them out")
    if source.data is None and not together.is_first():
        return None
    with reserved(out, shown, running, calibrates=source.covariances is None) as checkpoint:
        avoided = row_spaces(avoid)
        with console.Bars(shown.quiet) as progress:
            if source.covariances is not None:
                sums = Covariances.load(source.covariances, partial=source.partial)
                spaces = NullSpaces.from_covariances(sums, rank=rank, spectrum=running.spectrum, avoid=avoided, progress=progress)
            else:
                mixture = text.mixture(source.data or [], source.weights)
                calibration = Calibration(loading.of(str(model)), layers, running, checkpoint, progress)
                calibration.read(mixture, text)
                calibration.open(rank, text.length)
                spaces = calibration.spaces(rank, avoided, running.spectrum)
        if not together.is_first():
            return None
        spaces.save(out, overwrite=shown.overwrite)
        data = described(source.data, source.weights) if source.data else str(source.covariances)
        facts = {"out": str(out), "model": model, "data": data, "seconds": time.perf_counter() - began}
        return console.show_spaces(spaces, facts, as_json=shown.as_json, quiet=shown.quiet, all_rows=shown.all_rows)


def covariances(
    *,
    model: str = options.MODEL,
    data: list[str] = ALONE,
    weights: str | None = WEIGHTS,
    out: Path = option("Directory for the second moments; must not exist yet."),
    text: Text,
    layers: LayersToKeep,
    loading: Loading,
    running: Running,
    shown: ShownTable,
) -> dict[str, Any] | None:
    """Keep the second moments themselves, for any method and rank later, or to be merged with those of other data."""
    began = time.perf_counter()
    with reserved(out, shown, running, calibrates=True) as checkpoint:
        part = None if layers.shard is None else _parse_shard(layers.shard)
        with console.Bars(shown.quiet) as progress:
            mixture = text.mixture(data, weights)
            calibration = Calibration(loading.of(model), layers, running, checkpoint, progress)
            calibration.read(mixture, text)
            calibration.open(None, text.length)
            sums = calibration.covariances(out, keep=layers.keep, shard=part, overwrite=shown.overwrite)
        if not together.is_first():
            return None
        facts = {"out": str(out), "model": model, "data": described(data, weights), "seconds": time.perf_counter() - began}
        return console.show_covariances(sums, facts, as_json=shown.as_json, quiet=shown.quiet, all_rows=shown.all_rows)


@contextlib.contextmanager
def reserved(out: Path, shown: Shown, running: Running, *, calibrates: bool) -> Iterator[Path]:
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
            if calibrates:
                end.args = (_what_is_kept(directory, fresh=running.fresh),)
            raise
        if calibrates and job.first:
            checkpoint.delete(directory)


def _what_is_kept(directory: Path, *, fresh: bool) -> str:
    """What an interrupted calibration has left, and how to go on."""
    from nullspace.artifacts import checkpoint
    from nullspace.calibration.interruption import batches_in

    sites, batches = checkpoint.sites_in(directory), batches_in(directory / checkpoint.SUMS)
    kept = [f"{sites} finished sites"] if sites else []
    if batches is not None:
        kept.append(f"the sums {'of the others ' if sites else ''}over {batches} batches")
    if not kept:
        return "nothing is kept"
    command = "the same command without --fresh" if fresh else "the same command"
    return f"{directory} has {' and '.join(kept)}, and {command} goes on behind them"


# ---- a calibration


@dataclass
class Calibration:
    """A model, the data that it is run on, and how. `read` sets tokenizer and batches, `open` model and targets.

    Data are read first: what is wrong with them is an error before the weights are read.
    """

    base: ModelSource
    layers: Layers
    running: Running
    checkpoint: Path | None
    progress: Progress
    model: Any = None
    tokenizer: Any = None
    targets: Any = None
    batches: Any = None

    def read(self, data: Mixture, text: Text) -> None:
        """Read the data and cut them into batches. Sequences longer than the model takes are an error before that."""
        from nullspace.integrations.transformers import read_config
        from nullspace.integrations.transformers.load import load_tokenizer

        self.progress("data", 0, 1, 0)
        if not self._is_gguf:
            check_length(read_config(self.base), self.base.name, text.length)
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.base)
        self.batches = text.batches(data, self.tokenizer)
        self.progress("data", 1, 1, 0)

    def open(self, rank: int | None, length: int | None) -> None:
        """Load the model, for sequences of this length, and find its targets."""
        from nullspace.integrations.transformers.load import load_tokenizer, load_weights
        from nullspace.model.sites import find_targets

        self.progress("model", 0, 1, 0)
        self.model = load_weights(self.base, **self.running.of_model())
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.base)
        self.progress("model", 1, 1, 0)
        if length is not None and self._is_gguf:
            check_length(self.model.config, self.base.name, length)
        targets, exclude = options.parse_targets(self.layers.targets), options.parse_exclude(self.layers.exclude)
        self.targets = find_targets(self.model, targets, exclude=exclude, rank=rank)

    @property
    def _is_gguf(self) -> bool:
        """Whether the configuration takes as long to read as the weights."""
        return Path(self.base).suffix == ".gguf"

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

        if self.checkpoint is not None and self.running.fresh and together.is_first():
            checkpoint.delete(self.checkpoint)
        return {
            "targets": self.targets,
            "strategy": self.running.strategy,
            "hidden_states": self.running.hidden_states,
            "precision": self.layers.precision,
            "experts": self.layers.experts,
            "checkpoint": self.checkpoint,
            "progress": self.progress,
        }


def load_model(base: ModelSource, progress: Progress, **how: Any) -> tuple[Any, Any]:
    """A model and its tokenizer, with a bar; `how` as in `nullspace.integrations.transformers.load_model`."""
    from nullspace.integrations import transformers

    progress("model", 0, 1, 0)
    loaded = transformers.load_model(base, **how)
    progress("model", 1, 1, 0)
    return loaded


def check_length(config: Any, name: str, length: int) -> None:
    """Raise `ValueError` for sequences that are longer than the positions of a model."""
    from nullspace.integrations.transformers import positions

    limit = positions(config)
    if limit is not None and length > limit:
        raise InputError(
            f"--length {length} is more than the {limit} positions that {name} has: give at most {limit}, or scale its rotary "
            "embeddings in its config.json if it has any"
        )


def row_spaces(adapters: list[Path] | None) -> dict[str, Any] | None:
    """Of --avoid: layer → what the rows of the adapters' A span."""
    if not adapters:
        return None
    from nullspace.integrations.peft import row_spaces

    return row_spaces(*adapters)
