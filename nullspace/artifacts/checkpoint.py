"""`Checkpoint`: the finished sites of a run in a directory, one file a site, each written completely or not at all.

`run.json` identifies the run: model, data, and every setting that the result depends on. A run with another identity gets an error
that names the differences. Files are written as `….part`, synced, and renamed; the next run overwrites the `.part` files of a
crash. Several processes write their own sites into one directory, and another number of processes may continue the run.

Every file holds SHA-256 digests of its facts and of each tensor, and `run.json` one of itself. A site with a damaged file is
computed again. A damaged `run.json` is an error, since the run of the other files is then unknown.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from nullspace.artifacts import locks, records, store
from nullspace.checks import an_object, check_fields, list_of, map_of, text
from nullspace.distributed import Job
from nullspace.errors import Busy, DamagedFileError, InputError, NullspaceWarning, OtherModelError, OutputExistsError
from nullspace.model.linear import weight_shape

RUN = "run.json"
_FILE = re.compile(r"[0-9]{5,}")
_RECORD_FIELDS = {"facts": an_object(), "tensors": map_of(text())}
_FACTS_FIELDS = {"members": list_of(text(), least=1, distinct=True)}
SUMS = "sums"  # folder of the sums of an interrupted resident pass (`nullspace.calibration.interruption`)
COVARIANCES = "covariances"  # folder of those that the command line's `init` keeps until its adapter is written
_OWN = re.compile(r"run\.json(\.[0-9]+)?(\.part)?|[0-9]{5,}\.safetensors(\.part)?")


class Checkpoint:
    """The finished sites of a run.

    Args:
        directory: is created when the first site is kept.
        run: identity of the run (`fingerprint_of_run`); values that JSON can hold.
        job: the processes that write into it; this process alone by default.

    Raises:
        ValueError: naming what differs, if the directory is another run's; naming `run.json`, if it is damaged.
        FileExistsError: if the directory is neither empty nor a checkpoint.
    """

    def __init__(self, directory: str | os.PathLike[str], run: Mapping[str, Any], job: Job | None = None) -> None:
        self._directory = Path(directory).absolute()
        self._run = dict(run)
        self._job = job or Job.alone()
        self._numbers: dict[str, int] = {}
        self._lock, self._held = contextlib.ExitStack(), False
        self._begun = (self._directory / RUN).exists()
        if self._begun:
            _compare(self._directory / RUN, self._run)
        else:
            check_place(self._directory)

    def load(
        self, check: Callable[[dict[str, Any], dict[str, torch.Tensor]], object] | None = None
    ) -> Iterator[tuple[dict[str, Any], Callable[..., dict[str, torch.Tensor]]]]:
        """Yields the facts of every kept site, and a function that reads its tensors (all, or those named), oldest first.

        Every file is first compared with its digests, which the processes share. Exhaust the generator before `hold` and `keep`.

        Args:
            check: raises `ValueError` for facts and tensors that do not belong to this run.

        Raises:
            ValueError: naming the file, by the reading function, if it was damaged in the meantime.

        Warns:
            UserWarning: naming file and site, for every file that is damaged or that `check` refuses. It is deleted, and its site
                must be computed again.
        """
        paths = sorted(path for path in self._directory.glob("*.safetensors") if _FILE.fullmatch(path.stem))
        own: dict[str, str] = {}
        for path in paths[self._job.number :: self._job.count]:
            try:
                facts, tensors = _facts(path), _read(path)
                if check is not None:
                    check(facts, tensors)
            except ValueError as error:
                own[path.name] = str(error.__cause__ or error)
        damaged = {name: reason for theirs in self._job.exchange(own) for name, reason in theirs.items()}
        owners: dict[str, Path] = {}
        for path in paths:
            facts = {} if path.name in damaged else _facts(path)
            twice = next((member for member in facts.get("members", ()) if member in owners), None)
            if twice is not None:
                damaged[path.name] = f"{twice!r} is in {owners[twice].name} already"
            if path.name in damaged:
                self._discard(path, damaged[path.name])
                continue
            owners.update(dict.fromkeys(facts["members"], path))
            self._numbers[facts["members"][0]] = int(path.stem)
            yield facts, functools.partial(_read, path)

    def _discard(self, path: Path, reason: str) -> None:
        if not self._job.first:
            return
        warnings.warn(
            f"{path} is damaged: its site is computed again. {_likely_site(path)}{reason}", NullspaceWarning, stacklevel=4
        )
        if not path.is_dir():
            path.unlink(missing_ok=True)

    def reader(self, site: str) -> Callable[..., dict[str, torch.Tensor]]:
        """A function that reads the tensors (all, or those named) of a site that any process has kept (`numbers`)."""
        return functools.partial(_read, self._path(self._numbers[site]))

    @property
    def numbers(self) -> dict[str, int]:
        """Site → number of its file. The caller adds the numbers of other processes' sites to this dictionary."""
        return self._numbers

    def hold(self) -> None:
        """Lock the directory until `close`; call this before computing sites to keep. The processes of the job share the lock.

        Raises:
            FileExistsError: naming it, if another run writes to it, or has written to it since `load`.
        """
        if self._held:
            return
        if self._job.first:  # for all processes
            self._lock.enter_context(locks.locked(self._directory))
        self._held = True
        there = {int(path.stem) for path in self._directory.glob("*.safetensors") if _FILE.fullmatch(path.stem) and path.is_file()}
        if self._job.first and there != set(self._numbers.values()):
            raise Busy(f"another run has written to {self._directory} in the meantime; start again, to go on behind it")

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()
        self._held = False

    def keep(self, site: str, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one site, replacing its previous file.

        Raises:
            OSError: if it cannot be written; the previous file then remains.
        """
        self.begin()
        if site not in self._numbers:  # the lowest free number (damaged files were deleted) that is this process's
            taken = set(self._numbers.values())
            free = (n for n in itertools.count(self._job.number, self._job.count) if n not in taken)
            self._numbers[site] = next(n for n in free if not self._path(n).is_dir())
        path = self._path(self._numbers[site])
        part = path.with_name(path.name + ".part")
        record = json.dumps({"facts": facts, "tensors": {name: _digest(tensor) for name, tensor in tensors.items()}})
        records.write_tensors(part, tensors, metadata={"record": record, "sha256": hashlib.sha256(record.encode()).hexdigest()})
        _publish(part, path)

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:05d}.safetensors"

    @property
    def sums(self) -> Path:
        """Where the sums of an interrupted pass are kept."""
        return self._directory / SUMS

    def begin(self) -> None:
        """Create the directory and its `run.json`, if they are not there."""
        if self._begun:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        part = self._directory / (f"{RUN}.{self._job.number}.part" if self._job.count > 1 else f"{RUN}.part")
        with store.writing(part):
            part.write_text(records.sealed(self._run), encoding="utf-8")
            _publish(part, self._directory / RUN)
        self._begun = True


def check_place(directory: Path) -> None:
    """Check that a directory is a checkpoint, empty, or missing.

    Raises:
        FileExistsError: if it is something else.
        ValueError: if its `run.json` is damaged, or not written by nullspace.
    """
    if os.path.lexists(directory / RUN):
        _read_run(directory / RUN)
    elif os.path.lexists(directory) and not (
        directory.is_dir() and all(path.name.endswith((".part", locks.SUFFIX)) for path in directory.iterdir())
    ):
        raise OutputExistsError(f"{directory} is in the way: it is no checkpoint of nullspace (it has no {RUN}); move it")


def sites_in(directory: Path) -> int:
    """Number of finished sites in a checkpoint; 0 if there is none."""
    return len(list(directory.glob("*.safetensors"))) if (directory / RUN).is_file() else 0


def delete(directory: Path) -> None:
    """Delete a checkpoint's files. Files of other origin stay, and then the directory too."""
    if not directory.is_dir():
        return
    for folder in (COVARIANCES, SUMS):
        store.delete_directory(directory / folder)
    own = [path for path in directory.iterdir() if _OWN.fullmatch(path.name) and path.is_file()]
    for path in sorted(own, key=lambda path: path.name == RUN):  # last, since it identifies the checkpoint
        path.unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Context manager: a kept file, and its record of facts and digests. Any damage raises `ValueError`, naming the file."""
    records.check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if hashlib.sha256(metadata["record"].encode()).hexdigest() != metadata["sha256"]:
                raise DamagedFileError("its SHA-256 does not fit its facts")
            record = json.loads(metadata["record"])
            check_fields(record, _RECORD_FIELDS, "its record")
            check_fields(record["facts"], _FACTS_FIELDS, "its facts")
            yield file, record
    except (SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged ({error})") from error


def _facts(path: Path) -> dict[str, Any]:
    with _opened(path) as (_, record):
        return dict(record["facts"])


def _read(path: Path, *names: str) -> dict[str, torch.Tensor]:
    tensors = {}
    with _opened(path) as (file, record):
        for name in names or record["tensors"]:
            tensors[name] = file.get_tensor(name)
            if _digest(tensors[name]) != record["tensors"][name]:
                raise DamagedFileError(f"the SHA-256 of the tensor {name!r} does not fit")
    return tensors


def _likely_site(path: Path) -> str:
    """Text that names the site of a damaged file, if it can be read."""
    try:
        records.check_regular(path)
        with safe_open(path, framework="pt") as file:
            return f"It held {json.loads(file.metadata()['record'])['facts']['members'][0]!r}. "
    except Exception:  # the damage was reported already
        return ""


def _digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() > 0:
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_site(facts: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    """Raise `ValueError` if a kept site has members that are not among these layers, or another width."""
    for member in facts["members"]:
        if member not in modules or weight_shape(modules[member])[1] != facts["d_in"]:
            raise DamagedFileError(f"{member!r} with inputs of width {facts['d_in']} is no layer of this run")


def _read_run(path: Path) -> dict[str, Any]:
    try:
        return records.read_sealed(path)
    except ValueError as error:
        raise InputError(
            f"{error}. Without it, nothing in {path.parent} can be used: delete that, or give another directory"
        ) from error


def _compare(path: Path, run: dict[str, Any]) -> None:
    there = _read_run(path)
    now = json.loads(json.dumps(run))
    if there == now:
        return
    keys = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    lines = "".join(f"\n  {key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in keys)
    raise OtherModelError(
        f"{path.parent} is the checkpoint of another run; delete it, or give another directory. It differs in:{lines}"
    )


def _publish(part: Path, path: Path) -> None:
    store.sync(part)
    part.rename(path)
    store.sync(path.parent)
