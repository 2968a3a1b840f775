"""What a method calibrates on: the arguments `task` and `keep` of `prepare`, as second moments or null spaces."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from nullspace.artifacts import records
from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.locks import temporary_folder
from nullspace.artifacts.spaces import NullSpaces, check_site_rank
from nullspace.calibration.covariances import compute_covariances
from nullspace.calibration.null_spaces import compute_null_spaces
from nullspace.calibration.run import check_options
from nullspace.checks import check_integer, check_one_of
from nullspace.distributed import Job
from nullspace.errors import DataWarning, InputError, InputTypeError
from nullspace.integrations.transformers.batches import checked_length, token_batches
from nullspace.integrations.transformers.corpus import default_corpus
from nullspace.methods import METHODS, OPTIONS, Sources, check_method
from nullspace.model.linear import weight_shape
from nullspace.model.sites import Site, Targets
from nullspace.planning.plan import EXPERTS
from nullspace.progress import Progress, reporter

KINDS: dict[str, Any] = {NullSpaces.KIND: NullSpaces, Covariances.KIND: Covariances}


@dataclass(frozen=True)
class Calibration:
    """How data are read and the model is run: arguments of `prepare`."""

    samples: int
    length: int | None
    batch_size: int
    strategy: str
    precision: str | Mapping[str, str]
    experts: str
    device: torch.device | str | None
    progress: bool | Progress

    def check(self, model: nn.Module) -> None:
        """Raise `TypeError` or `ValueError`, naming the argument, for a value that it does not take."""
        for name in ("samples", "batch_size", *(() if self.length is None else ("length",))):
            check_integer(name, getattr(self, name))
        checked_length(model, self.length)
        check_options(self.strategy, self.precision, "auto", self.device)
        check_one_of("experts", self.experts, EXPERTS)
        if self.strategy == "resident" and self.device is not None:
            raise InputError("device belongs to strategy='layerwise': a resident run computes where the weights are")

    def batches(self, data: Any, tokenizer: Any, model: nn.Module, name: str) -> Iterable[Any]:
        """The data of an argument as a loader."""
        if data is not None:
            return self._packed(data, tokenizer, model, name)
        if tokenizer is None:
            raise InputError("keep is not given, and the default text needs a tokenizer: give the model's, or keep=")
        packed: Any = self._packed(default_corpus(tokenizer), tokenizer, model, name)
        warnings.warn(
            f"keep is not given: {packed.tokens:,} tokens of Python's own documentation and code stand for what must be kept "
            "(English technical prose, questions and answers, in the chat template if there is one). Other subjects, languages and "
            "forms of prompt are kept less. Give text of your own (keep=), in the form in which the model will be used",
            DataWarning,
            stacklevel=5,
        )
        return packed

    def _packed(self, data: Any, tokenizer: Any, model: nn.Module, name: str) -> Iterable[Any]:
        sizes: dict[str, Any] = {"samples": self.samples, "length": self.length, "batch_size": self.batch_size}
        return token_batches(data, tokenizer, model, **sizes, name=name)


class Given(NamedTuple):
    """What a method is given, before anything is calibrated."""

    sources: Sources
    """The numbers, and what was computed before."""
    data: dict[str, tuple[str, Any]]
    """Source that is missing → name of the argument, and its data (None for the default)."""

    def loaders(self, how: Calibration, tokenizer: Any, model: nn.Module) -> dict[str, Iterable[Any]]:
        """Source that is missing → batches of its data, which are read and checked."""
        return {source: how.batches(data, tokenizer, model, name) for source, (name, data) in self.data.items()}


def read_arguments(method: str, task: Any, keep: Any, numbers: Mapping[str, Any], *, seed: int = 0) -> Given:
    """Check the arguments of a method, and load those that are folders of second moments or null spaces.

    Args:
        method, task, keep, numbers: of `prepare`.
        seed: of random numbers.

    Raises:
        TypeError: for a number that no method takes.
        ValueError: for an unknown method, a number that is out of range or not the method's, data that it does not use, a missing
            task, and folders and objects that it cannot start from; naming the file, for damaged ones.
    """
    check_method(method)
    unknown = next((name for name in numbers if name not in OPTIONS), None)
    if unknown is not None:
        raise InputTypeError(f"there is no argument {unknown!r}; the numbers of methods are {', '.join(OPTIONS)}")
    sources = Sources(**numbers, seed=seed)
    check_method(method, sources)
    missing: dict[str, tuple[str, Any]] = {}
    for name, value in (("task", task), ("keep", keep)):
        source = METHODS[method].data.get(name)
        if source is None and value is not None:
            raise InputError(f"method {method!r} makes no use of {name}: leave it out")
        if source is None:
            continue
        if name == "task" and value is None:
            raise InputError(
                f"method {method!r} needs examples of the task (task=): a few dozen are enough. Without any, method='lora-null' "
                "starts from what must be kept alone"
            )
        known = _known(value, name)
        if known is None:
            missing[source] = name, value
        elif isinstance(known, Covariances):
            changed = "covariances" if source == "spaces" else source
            sources = replace(sources, **{changed: known})  # type: ignore[arg-type]
        elif source == "spaces":
            sources = replace(sources, spaces=known)
        else:
            raise InputError(f"{name} is null spaces, and method {method!r} needs second moments: nullspace.compute_covariances")
    return Given(sources, missing)


def _known(value: Any, name: str) -> Covariances | NullSpaces | None:
    """Second moments or null spaces that are there already; None for data."""
    if isinstance(value, (Covariances, NullSpaces)):
        return value
    if not isinstance(value, (str, os.PathLike)) or not os.path.isfile(os.path.join(value, records.MANIFEST)):
        return None
    kind = records.kind_of(value)
    if kind not in KINDS:
        raise InputError(
            f"{name}: {os.fspath(value)} is a folder of kind {kind!r}: second moments (`nullspace covariances`) or null spaces "
            "(`nullspace compute`, the spaces/ of an init) are needed"
        )
    loaded: Covariances | NullSpaces = KINDS[kind].load(value)
    return loaded


def check_spaces_rank(layers: Targets, rank: int) -> None:
    """Raise `ValueError`, naming the layer, if a null space of `rank` columns does not fit one."""
    for name, layer in layers.items():
        check_site_rank(Site((name,), weight_shape(layer)[1]), rank, {})


@contextlib.contextmanager
def calibrated(
    model: nn.Module, layers: Targets, given: Given, loaders: Mapping[str, Iterable[Any]], how: Calibration, rank: int, job: Job
) -> Iterator[Sources]:
    """Context manager: the sources of a method, complete. Second moments are in a temporary folder, which is deleted at the end.

    Args:
        model: the base model.
        layers: that get adapters. Those of `"all-linear"` that the data do not reach are removed.
        given: of `read_arguments`.
        loaders: of `Given.loaders`.
        how: how the model is run.
        rank: columns of null spaces.
        job: the processes that work together, which see one directory for temporary files.
    """
    report = reporter(how.progress, bars=job.first)
    options: dict[str, Any] = {name: getattr(how, name) for name in ("strategy", "precision", "experts", "device")}
    sources = given.sources
    with contextlib.ExitStack() as held:
        own = held.enter_context(temporary_folder()) if job.first and loaders.keys() - {"spaces"} else None
        folder: Any = job.exchange(own)[0]
        for source, loader in loaders.items():
            options["progress"] = _named(report, given.data[source][0])
            made: Any
            if source == "spaces":
                made = compute_null_spaces(model, loader, rank=rank, targets=layers, job=job, **options)
            else:
                made = compute_covariances(model, loader, folder / source, targets=layers, job=job, **options)
            sources = replace(sources, **{source: made})
        yield sources
        job.exchange(None)  # the others may still be reading


def _named(report: Progress, name: str) -> Progress:
    """The progress of a pass over the data of one argument."""
    return lambda stage, done, total, tokens: report(f"{stage}, {name}", done, total, tokens)
