"""`Sitewise`: a mapping from module names to one value per site, saved in a directory and read lazily, site by site.

`NullSpaces` and `Covariances` are such mappings. They also hold the shapes and fingerprints of the members' weights, which identify
the model.
"""

from __future__ import annotations

import abc
import math
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from nullspace.artifacts import identity, records, store
from nullspace.artifacts.identity import Weight, Weights, weights_of
from nullspace.artifacts.shared_writes import written_once
from nullspace.checks import Field, an_object, check_fields, check_tensor, file_name, list_of, map_of, optional, text, whole
from nullspace.distributed import Job
from nullspace.errors import DamagedFileError, InputError, OtherModelError
from nullspace.model.sites import Site

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
FINGERPRINT = "fingerprint."

# Fields of every site in a manifest, beside those of its value.
_SITE_FIELDS = {
    "file": file_name(),
    "members": list_of(text(), least=1, distinct=True),
    "d_in": whole(1),
    "weight_shapes": map_of(list_of(whole(1), least=2, most=2)),
}


class Entry(abc.ABC, Generic[T]):
    """One site, and access to its value."""

    def __init__(self, site: Site) -> None:
        self.site = site

    @abc.abstractmethod
    def value(self) -> T:
        """The value, which may be read or computed first."""

    @abc.abstractmethod
    def weights(self) -> Weights:
        """Shapes and fingerprints of the members' weights, as far as they are known."""


class _InMemory(Entry[T]):
    def __init__(self, site: Site, value: T, weights: Weights) -> None:
        super().__init__(site)
        self._value, self._weights = value, {m: weights[m] for m in site.members if m in weights}

    def value(self) -> T:
        return self._value

    def weights(self) -> Weights:
        return self._weights


class _Stored(Entry[T]):
    """A value that is read from its file when needed, and again after the last reference to it is dropped."""

    def __init__(
        self,
        directory: Path,
        entry: Mapping[str, Any],
        manifest: Mapping[str, Any],
        unpack: Callable[[Mapping[str, Any], Mapping[str, torch.Tensor]], T],
    ) -> None:
        super().__init__(Site(tuple(entry["members"]), entry["d_in"]))
        self._directory, self._entry, self._manifest, self._unpack = directory, entry, manifest, unpack
        self._read_before: weakref.ref[Any] | None = None

    def value(self) -> T:
        value = None if self._read_before is None else self._read_before()
        if value is None:
            tensors = records.read_tensors(self._directory, self._entry["file"], self._manifest)
            try:
                value = self._unpack(self._entry, tensors)
            except ValueError as error:
                raise DamagedFileError(f"{self._directory / self._entry['file']}: {error}") from error
            self._read_before = weakref.ref(value)
        return value

    def weights(self) -> Weights:
        shapes: Mapping[str, list[int]] = self._entry["weight_shapes"]
        # `read_tensors` would read the whole file, which was checked when the directory was opened.
        path = self._directory / self._entry["file"]
        try:
            with safe_open(path, framework="pt") as file:
                prints = {key: file.get_tensor(key) for key in file.keys() if key.startswith(FINGERPRINT)}  # noqa: SIM118
        except (SafetensorError, FileNotFoundError) as error:
            raise DamagedFileError(f"{path} is missing or was altered since it was opened: {error}") from error
        for key, mark in prints.items():
            check_tensor(prints, key, (min(len(mark.reshape(-1)), identity.FINGERPRINT_ENTRIES),), (torch.float32,), path)
        return {name: ((shape[0], shape[1]), prints.get(FINGERPRINT + name)) for name, shape in shapes.items()}


class Fetched(Entry[T]):
    """A value that is computed when needed, and again after the last reference to it is dropped.

    Args:
        site: of the value.
        make: computes the value.
        weights: of the site's members; others are ignored.
    """

    def __init__(self, site: Site, make: Callable[[], T], weights: Weights) -> None:
        super().__init__(site)
        self._make, self._weights = make, {m: weights[m] for m in site.members if m in weights}
        self._made_before: weakref.ref[Any] | None = None

    def value(self) -> T:
        value = None if self._made_before is None else self._made_before()
        if value is None:
            value = self._make()
            self._made_before = weakref.ref(value)
        return value

    def weights(self) -> Weights:
        return self._weights


class Sitewise(Mapping[str, T], Generic[T]):
    """Module name → value of its site; the members of a site share one object.

    Subclasses define how a value is stored (`_pack`, `_unpack`), and the class variables.
    """

    KIND: ClassVar[str]
    """Kind of the directories, in their manifests."""
    WHAT: ClassVar[str]
    """Name of a value in messages: "there is no … for this layer"."""
    FIELDS: ClassVar[Mapping[str, Field]]
    """Fields of a value's facts in the manifest."""
    MORE_FIELDS: ClassVar[Mapping[str, Field]] = {"matrix_parameters": optional(whole())}
    """Fields of the manifest, beside the sites."""

    matrix_parameters: int | None = None
    """Parameters in the matrices of the model that was calibrated, embeddings and output head aside; None if that is unknown."""

    def __init__(
        self, values: Iterable[tuple[Site, T]], weights: Weights | None = None, *, matrix_parameters: int | None = None
    ) -> None:
        self.matrix_parameters = matrix_parameters
        self._set_entries(_InMemory(site, value, weights or {}) for site, value in values)

    def _set_entries(self, entries: Iterable[Entry[T]]) -> None:
        # Members of a site are mostly accessed one after the other, so the last value is held.
        self._last: tuple[Entry[T], T] | None = None
        self._entries: tuple[Entry[T], ...] = tuple(entries)
        self._of = {name: entry for entry in self._entries for name in entry.site.members}

    @staticmethod
    @abc.abstractmethod
    def _pack(value: T) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Facts, which JSON can hold, and tensors."""

    @staticmethod
    @abc.abstractmethod
    def _unpack(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> T:
        """The inverse of `_pack`; the facts include `members` and `d_in`."""

    def __getitem__(self, name: str) -> T:
        entry = self._of[name]
        if self._last is None or self._last[0] is not entry:
            self._last = None
            self._last = (entry, entry.value())
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._entries)} sites, {len(self)} layers)"

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in the order of the run that computed them."""
        return tuple(entry.site for entry in self._entries)

    @property
    def covered_share(self) -> float | None:
        """The share of the parameters in the model's matrices (embeddings and output head aside) that these layers have."""
        if not self.matrix_parameters:
            return None
        shapes = (shape for entry in self._entries for shape, _ in entry.weights().values())
        return sum(map(math.prod, shapes)) / self.matrix_parameters

    def notes(self) -> list[str]:
        """Sentences below a table of the sites."""
        share = self.covered_share
        if share is None:
            return []
        return [f"{share:.1%} of the parameters in the model's matrices (embeddings and output head aside) are in these layers."]

    def weight(self, name: str) -> Weight | None:
        """Shape and fingerprint of a layer's weight at calibration, as far as they are known."""
        return self._of[name].weights().get(name)

    def check(self, name: str, module: nn.Module | None, weight: Weight | None = None) -> None:
        """Check that this was computed for this layer of this model.

        Args:
            name: the layer's name in the model that was calibrated.
            module: the linear layer; None with `weight`.
            weight: shape and fingerprint of its weight, if they are known; of a sharded weight, `weights_of` is a collective.

        Raises:
            ValueError: with both values, if the name is unknown, or the shape or the fingerprint differs.
        """
        if name not in self._of:
            known = ", ".join(list(self._of)[:3])
            raise InputError(f"there is no {self.WHAT} for {name!r}; there are such for {known}, … ({len(self)} layers)")
        if weight is None:
            assert module is not None
            weight = weights_of({name: module})[name]
        shape, mark = weight
        entry = self._of[name]
        known_shape, known_print = entry.weights().get(name) or ((shape[0], entry.site.d_in), None)
        if shape != known_shape:
            raise OtherModelError(
                f"this {self.WHAT} is of another model: {name!r} has weight {shape} here and had {known_shape} at calibration"
            )
        if known_print is not None and mark is not None and not identity.same_fingerprint(known_print, mark):
            raise OtherModelError(
                f"this {self.WHAT} is of another model: the weight of {name!r} begins with {_head(mark)} here and with "
                f"{_head(known_print)} at calibration"
            )

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a directory: `nullspace.json` and one safetensors file a site, completely or not at all.

        In a process group, one process may call this, or all of them. Then one writes, and the others return when it is done.

        Args:
            directory: must not exist yet, or be empty.
            overwrite: replace a directory that nullspace wrote.

        Raises:
            FileExistsError: if the directory exists and may not be replaced, or another run is writing to it.
            OSError: if it cannot be written; nothing is left behind. An error of the writing process is raised by all callers.
        """

        def write() -> None:
            with store.new_directory(directory, overwrite=overwrite) as part:
                self.write(part)

        written_once(directory, write)

    def write(self, directory: Path) -> None:
        """Write the files of `save` into a directory that the caller creates and renames."""
        sites = ((each.site, *self._pack(each.value()), each.weights()) for each in self._entries)
        write_sites(directory, self.KIND, sites, content=self._content())

    def _content(self) -> dict[str, Any]:
        """The fields of the manifest beside the sites."""
        return {} if self.matrix_parameters is None else {"matrix_parameters": self.matrix_parameters}

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Self:
        """Open a directory that `save` wrote, and check every byte. Tensors are read from their files when needed, site by site.

        Raises:
            FileNotFoundError: if there is no such directory.
            ValueError: naming the file that is missing, truncated, altered or not written by nullspace.
        """
        return cls._open(directory, check=True)

    @classmethod
    def _open(cls, directory: str | os.PathLike[str], *, check: bool) -> Self:
        """`load`; without `check`, each file is checked when it is read."""
        directory = Path(directory).absolute()  # files are read later, when the working directory may be another one
        manifest = records.read_manifest(directory, cls.KIND, {"sites": list_of(an_object()), **cls.MORE_FIELDS})
        _check_sites(manifest, cls.FIELDS, directory / records.MANIFEST)
        for entry in manifest["sites"] if check else ():
            records.check_file(directory, entry["file"], manifest)
        loaded = cls(())
        loaded._set_entries(_Stored(directory, entry, manifest, cls._unpack) for entry in manifest["sites"])
        try:
            loaded._read_more(manifest)
        except ValueError as error:
            raise DamagedFileError(f"{directory / records.MANIFEST}: {error}") from error
        return loaded

    def _read_more(self, manifest: Mapping[str, Any]) -> None:
        """Read the fields of the manifest beside the sites; `ValueError` for a wrong value."""
        self.matrix_parameters = manifest.get("matrix_parameters")


def _check_sites(manifest: Mapping[str, Any], fields: Mapping[str, Field], path: Path) -> None:
    """Raise `ValueError`, naming the file and the site, if the manifest's sites have wrong fields or contradict each other."""
    known: dict[str, int] = {}
    files: dict[str, int] = {}
    for number, entry in enumerate(manifest["sites"]):
        where = f"{path}, site {number}"
        check_fields(entry, _SITE_FIELDS, where)
        check_fields(entry, fields, where)
        for name, shape in entry["weight_shapes"].items():
            if name not in entry["members"] or shape[1] != entry["d_in"]:
                raise DamagedFileError(
                    f"{where}: the weight {shape} of {name!r} is not of a layer with inputs of width {entry['d_in']}"
                )
        twice = next((member for member in entry["members"] if member in known), None)
        if twice is not None:
            raise DamagedFileError(f"{where}: {twice!r} belongs to site {known[twice]} already")
        if entry["file"] in files:
            raise DamagedFileError(f"{where}: {entry['file']!r} is the file of site {files[entry['file']]} already")
        known.update(dict.fromkeys(entry["members"], number))
        files[entry["file"]] = number


def write_sites(
    directory: Path,
    kind: str,
    sites: Iterable[tuple[Site, Mapping[str, Any], Mapping[str, torch.Tensor], Weights]],
    *,
    content: Mapping[str, Any] | None = None,
    job: Job | None = None,
    order: Sequence[str] = (),
) -> None:
    """Write one file a site, then the manifest. Only one site is in memory at a time.

    Args:
        directory: the same for all processes.
        kind: of the directory.
        sites: those of this process.
        content: more fields of the manifest.
        job: the processes; the first one writes the manifest. This process alone by default.
        order: names of layers; with several processes, they number the files.
    """
    job = job or Job.alone()
    directory.mkdir(parents=True, exist_ok=True)
    positions = {name: index for index, name in enumerate(order)}
    entries: list[dict[str, Any]] = []
    for count, (site, facts, tensors, weights) in enumerate(sites):
        index = count if job.count == 1 else min(positions[member] for member in site.members)
        name = f"{index:04d}-{re.sub(r'[^A-Za-z0-9._-]', '_', site.name)[:200]}.safetensors"
        prints = {FINGERPRINT + m: mark for m, (_, mark) in weights.items() if mark is not None}
        records.write_tensors(directory / name, {**tensors, **prints})
        shapes = {m: shape for m, (shape, _) in weights.items()}
        entries.append({"file": name, "members": list(site.members), "d_in": site.d_in, **facts, "weight_shapes": shapes})
        del tensors
    looks = records.looks_of(directory, [entry["file"] for entry in entries])
    written = job.exchange((entries, looks))
    if job.first:
        files = {name: look for _, theirs in written for name, look in theirs.items()}
        missing = next((name for name in files if not (directory / name).is_file()), None)
        if missing is not None:
            raise InputError(f"{directory / missing} was written by another process and is not here: choose a place that all see")
        everyones = [entry for theirs, _ in written for entry in theirs]
        in_order = everyones if job.count == 1 else sorted(everyones, key=lambda entry: str(entry["file"]))
        records.write_manifest(directory, kind, {**(content or {}), "sites": in_order}, files)


def _head(sample: torch.Tensor) -> str:
    return "[" + ", ".join(f"{v:.4g}" for v in sample[:4].tolist()) + ", …]"
