"""`filter_checkpoint`: a model that was trained whole, W₀ + (W₁ − W₀) F, written tensor by tensor."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch

from nullspace.artifacts import identity, records, store
from nullspace.artifacts.identity import Weight
from nullspace.artifacts.shared_writes import written_once
from nullspace.checks import NOT_NEGATIVE, check_real, is_plain_name
from nullspace.errors import DamagedFileError, InputError, MissingFileError, OtherModelError, TargetWarning
from nullspace.factors import RIDGE, Filter
from nullspace.integrations.peft.base import COPIED
from nullspace.integrations.peft.files import located
from nullspace.integrations.peft.filtering.adapters import Filtered, check_early, facts_of
from nullspace.integrations.peft.filtering.drift import drifts_of
from nullspace.integrations.peft.filtering.moments import NAMES, Few, Moments, Pair, loaded, place_of
from nullspace.integrations.peft.filtering.paths import STRENGTHS, Budget, FilterPath, choose, forecast
from nullspace.integrations.peft.folders.cards import write_card
from nullspace.integrations.peft.folders.checkpoints import is_residual, local_folder
from nullspace.integrations.peft.layers import RESIDUAL_DTYPES
from nullspace.integrations.transformers.load import empty_model
from nullspace.model.linear import is_conv1d
from nullspace.model.wrappers import named_modules
from nullspace.progress import Progress, reporter

KIND = "filtered checkpoint"
_INDEX = "model.safetensors.index.json"
_ONE = "model.safetensors"


class Checkpoint:
    """The tensors of a folder of safetensors files, read one at a time.

    Args:
        name: a folder, or a hub name, which is looked up in the local cache.

    Attributes:
        folder: its absolute path.
        files: name of the file → its tensors on the meta device, by name, and the text in its header.

    Raises:
        FileNotFoundError: if there is no such folder, or no safetensors file in it.
        ValueError: naming the file, if one is damaged; if the folder is a residual base.
    """

    def __init__(self, name: str | os.PathLike[str]) -> None:
        folder = local_folder(name)
        if folder is None:
            raise MissingFileError(f"{name} is neither a folder nor a model in the local cache of the hub: download it first")
        self.folder = Path(os.path.abspath(folder))
        if is_residual(self.folder):
            raise InputError(f"{self.folder} is a residual base: name the untouched model")
        self.files = {file: records.read_shapes(self.folder / file) for file in _weight_files(self.folder)}
        self._file_of = {key: file for file, (tensors, _) in self.files.items() for key in tensors}
        inner = Counter(key.partition(".")[2] for key in self._file_of)
        self._inner = {short: key for key in self._file_of if inner[short := key.partition(".")[2]] == 1}

    def like(self, key: str) -> torch.Tensor:
        """A tensor on the meta device, of the shape and dtype of this one."""
        return self.files[self._file_of[key]][0][key]

    def read(self, key: str) -> torch.Tensor:
        """The values of a tensor."""
        return records.read_tensor(self.folder / self._file_of[key], key)

    def twin(self, name: str) -> str | None:
        """A tensor's name here. Checkpoints of a base class have the same names without the first component."""
        for key in (name, name.partition(".")[2], self._inner.get(name, "")):
            if key in self._file_of:
                return key
        return None


def _weight_files(folder: Path) -> list[str]:
    """The names of a checkpoint's files: as transformers, the one file where there is one, else those of the index."""
    if (folder / _ONE).is_file():
        return [_ONE]
    if not (folder / _INDEX).is_file():
        raise MissingFileError(f"{folder} holds neither {_ONE} nor {_INDEX}: save the model with save_pretrained")
    index = records.read_json(folder / _INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(map(is_plain_name, names.values())):
        raise DamagedFileError(f"{folder / _INDEX} is no index of the files of a checkpoint")
    return sorted(set(names.values()))


class _Changes(Mapping[str, torch.Tensor]):
    """Layer → W₁ − W₀, (d_out, d_in) float64, of the layers that have second moments. Each is read when it is needed."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, layers: Iterable[str]) -> None:
        self._base, self._tuned = base, tuned
        modules = named_modules(empty_model(tuned.folder))
        transposed = {name for name, module in modules.items() if is_conv1d(module)}
        transposed |= {name.partition(".")[2] for name in transposed}
        self._keys: dict[str, tuple[str, str, bool]] = {}
        for layer in layers:
            keys = base.twin(f"{layer}.weight"), tuned.twin(f"{layer}.weight")
            if keys[0] is None or keys[1] is None:
                where = base if keys[0] is None else tuned
                raise OtherModelError(f"there are second moments for {layer!r}, and {where.folder} has no weight of it")
            ours, theirs = base.like(keys[0]), tuned.like(keys[1])
            if ours.shape != theirs.shape:
                raise OtherModelError(
                    f"{keys[1]!r} is {tuple(theirs.shape)} in {tuned.folder} and {tuple(ours.shape)} in {base.folder}"
                )
            for each, key in ((ours, keys[0]), (theirs, keys[1])):
                if each.dtype not in RESIDUAL_DTYPES or each.ndim != 2:
                    raise InputError(
                        f"{key!r} is {each.dtype} {tuple(each.shape)}: only weights that are not quantised can be filtered"
                    )
            self._keys[layer] = keys[0], keys[1], layer in transposed or layer.partition(".")[2] in transposed

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, layer: str) -> torch.Tensor:
        _, key, turned = self._keys[layer]
        tuned = self._tuned.read(key)
        if not bool(tuned.isfinite().all()):
            raise DamagedFileError(f"{self._tuned.folder} holds NaN or Inf in {key!r}")
        return (tuned.mT if turned else tuned).double() - self.base(layer)

    def base(self, layer: str) -> torch.Tensor:
        """W₀, (d_out, d_in) float64."""
        key, _, turned = self._keys[layer]
        stored = self._base.read(key)
        if not bool(stored.isfinite().all()):
            raise DamagedFileError(f"{self._base.folder} holds NaN or Inf in {key!r}")
        return (stored.mT if turned else stored).double()

    def known(self) -> dict[str, Weight]:
        """Layer → shape and fingerprint of W₀. Reads all of them."""
        weights: dict[str, Weight] = {}
        for layer, (key, _, turned) in self._keys.items():
            d_out, d_in = self._base.like(key).shape[:: -1 if turned else 1]
            weights[layer] = (d_out, d_in), identity.fingerprint(self._base.read(key))
        return weights

    def stored(self, layer: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
        """The name of a layer's weight in the tuned checkpoint, and a weight as it stores it.

        Raises:
            ValueError: naming it, for values beyond the range of its dtype.
        """
        _, key, turned = self._keys[layer]
        like = self._tuned.like(key)
        stored = (weight.mT if turned else weight).to(like.dtype)
        if not bool(stored.isfinite().all()):
            raise InputError(f"the filtered {key!r} is beyond the range of {like.dtype}")
        return key, stored


def filter_checkpoint(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    task: Moments,
    keep: Moments,
    out: str | os.PathLike[str],
    *,
    strength: float | None = None,
    drift: float | None = None,
    retain: float | None = None,
    scale: float = 1.0,
    ridge: float = RIDGE,
    overwrite: bool = False,
    progress: bool | Progress = True,
) -> Filtered:
    """Filter a model that was trained whole: every linear weight becomes W₀ + (W₁ − W₀) T (T + μ C_k)⁻¹, rounded once.

    Files, shards, names and dtypes are those of the tuned checkpoint. Tensors without second moments (embeddings, norms, biases,
    the head) stay as they were tuned. In memory, one site and one weight at a time. A layer costs 10 · d_out · d_in² flops beside
    the decomposition of its site.

    Args:
        base: folder of the checkpoint before training (safetensors, one file or several with an index), or a hub name, which is
            looked up in the local cache.
        tuned: the same after training.
        task, keep, strength, drift, retain, scale, ridge: of `filter_adapter`. All layers that either of `task` and `keep` has are
            filtered.
        out: directory for the filtered checkpoint, with its configuration and tokenizer: written whole or not at all.
        overwrite: replace an earlier output of ours.
        progress: True for bars, False for none, or a callable (`nullspace.progress.Progress`).

    Returns:
        The strength and the forecast path; `rest` has the tensors that training has changed and that stay as they were tuned.

    Raises:
        FileNotFoundError: if a folder or a file is missing.
        TypeError, ValueError: as `filter_adapter`; naming the tensor, if one of them lacks it or has another shape, is quantised,
            or holds NaN or Inf.
        FileExistsError, OSError: if `out` is in the way, or cannot be written; then nothing is left behind.

    Warns:
        UserWarning: naming sites whose data are too few; naming the tensors of `rest`.
    """
    budget = Budget.checked(strength, drift, retain, scale)
    report, pair = reporter(progress), Pair(loaded(task), loaded(keep), ridge)
    check_early(out, overwrite=overwrite)
    before, after = Checkpoint(base), Checkpoint(tuned)
    changes, drifts = _prepare(before, after, pair, report)
    chosen = float(budget.strength) if budget.strength is not None else choose(budget, changes, pair, drifts, report)
    run = functools.partial(forecast, changes, pair, drifts, (0.0, chosen), budget.scale, report)
    facts = {"model": located(os.fspath(base)), "tuned": located(os.fspath(tuned))}
    results: list[tuple[FilterPath, Few]] = []

    def write() -> None:
        with store.new_directory(out, overwrite=overwrite) as part:
            with _Files(part, after) as files:

                def done(name: str, one: Filter) -> None:
                    weight = changes.base(name) + budget.scale * one.apply(changes[name], chosen)
                    files.write(*changes.stored(name, weight))

                results.append(run(done=done))
                rest = files.write_rest(before)
            known = {"task": place_of(task), "keep": place_of(keep), "ridge": pair.ridge}
            known |= facts_of(Filtered(chosen, results[0][0], Path(out)))
            write_card(part, "model", {**facts, "filter": known}, facts["model"])
            records.write_manifest(part, KIND, {**facts, "filter": known, "rest": rest}, files=tuple(after.files))

    written_once(out, write)
    path, few = results[0] if results else run()  # another process has written
    few.warn(stacklevel=2)
    rest = tuple(records.read_manifest(out, KIND)["rest"])
    if rest:
        named = f"{', '.join(map(repr, rest[:NAMES]))}{f' and {len(rest) - NAMES} more' if len(rest) > NAMES else ''}"
        warnings.warn(
            f"{len(rest)} tensors that training has changed have no second moments, and stay as they were tuned: {named}",
            TargetWarning,
            stacklevel=2,
        )
    return Filtered(chosen, path, Path(out), rest)


def checkpoint_path(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    task: Moments,
    keep: Moments,
    *,
    strengths: Sequence[float] = STRENGTHS,
    scale: float = 1.0,
    ridge: float = RIDGE,
    progress: bool | Progress = True,
) -> FilterPath:
    """What filters of several strengths would do to a checkpoint; nothing is written. As `filter_path` for an adapter.

    Args, errors: of `filter_checkpoint` and `filter_path`.
    """
    report, pair = reporter(progress), Pair(loaded(task), loaded(keep), ridge)
    check_real("scale", scale)
    strengths = [check_real("strengths", each, NOT_NEGATIVE) for each in strengths]
    changes, drifts = _prepare(Checkpoint(base), Checkpoint(tuned), pair, report)
    return forecast(changes, pair, drifts, strengths, scale, report)[0]


def _prepare(before: Checkpoint, after: Checkpoint, pair: Pair, report: Progress) -> tuple[_Changes, dict[str, float]]:
    """The changes of all layers that have second moments, after all checks, and their drifts before filtering."""
    changes = _Changes(before, after, dict.fromkeys((*pair.keep, *pair.task)))
    pair.check(changes.known(), str(after.folder))
    return changes, drifts_of(changes, pair.keep, changes.base, report)


class _Files:
    """The files of a filtered checkpoint, in the making. Use as a context manager.

    Args:
        part: the directory.
        like: the checkpoint whose files, configuration and tokenizer they have.
    """

    def __init__(self, part: Path, like: Checkpoint) -> None:
        self._like, self._open = like, contextlib.ExitStack()
        for path in sorted(like.folder.iterdir()):
            other = path.name == records.MANIFEST or (path.name == _INDEX and _ONE in like.files)
            if path.suffix in COPIED and not other and path.is_file():
                shutil.copyfile(path, part / path.name)
        self._file_of: dict[str, records.TensorFile] = {}
        for name, (tensors, text) in like.files.items():
            file = self._open.enter_context(records.TensorFile(part / name, tensors, text))
            self._file_of |= dict.fromkeys(tensors, file)

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Write one tensor."""
        self._file_of.pop(key).write(key, tensor)

    def write_rest(self, base: Checkpoint) -> list[str]:
        """Write all other tensors as they are. Returns the names of those that differ from the base's."""
        changed = []
        for key in list(self._file_of):
            tensor, other = self._like.read(key), base.twin(key)
            self.write(key, tensor)
            if other is None or not torch.equal(base.read(other), tensor):
                changed.append(key)
        return changed

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)
