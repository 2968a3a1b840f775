"""What a long run has finished, on disk: a directory of one file a site, each written whole or not at all.

`run.json` says which run it belongs to: the identity of model and data, and every setting that the result depends on. Whoever
comes with another one is told what differs. A file is written under another name, synced, and renamed; what a crash leaves half
done is called `.part` and is overwritten by the next run. Several processes write their own sites into one directory, and another
number of them may go on with it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from nullspace import store
from nullspace.distributed import Job
from nullspace.parts import is_sharded, shape_of
from nullspace.sharded import class_of
from nullspace.shares import add_to_digest
from nullspace.weights import execution_device, restore_layout, tensor_of

RUN = "run.json"


class Checkpoint:
    """Sites that are finished.

    Args:
        directory: is made when the first site is kept.
        run: which run this is (`fingerprint_of_run`), as JSON takes it.
        job: the processes that write into it; this one alone by default.

    Raises:
        ValueError: naming what differs, if the directory is another run's; naming the file, if it is damaged.
        FileExistsError: if the directory is not empty and not ours.
    """

    def __init__(self, directory: str | os.PathLike[str], run: Mapping[str, Any], job: Job | None = None) -> None:
        self._directory = Path(directory)
        self._run = dict(run)
        self._job = job or Job.alone()
        self._numbers: dict[str, int] = {}
        self._begun = (self._directory / RUN).is_file()
        if self._begun:
            _compare(self._directory / RUN, self._run)
        elif self._directory.is_dir() and any(not p.name.endswith(".part") for p in self._directory.iterdir()):
            raise FileExistsError(f"{self._directory} has files but no {RUN}: it is no checkpoint of nullspace")

    def load(self) -> Iterator[tuple[dict[str, Any], Callable[..., dict[str, torch.Tensor]]]]:
        """What was kept, in the order in which it was first kept: facts, and what reads the tensors (all, or those named).

        To be drawn to its end before `keep`.

        Raises:
            ValueError: naming the file, if it is damaged; of its tensors, when they are read.
        """
        for path in sorted(self._directory.glob("*.safetensors")):
            with _naming(path), safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
                self._numbers[facts["members"][0]] = int(path.stem)
            yield facts, functools.partial(_read, path)

    def reader(self, site: str) -> Callable[..., dict[str, torch.Tensor]]:
        """What reads the tensors (all, or those named) of a site that was kept, by whichever process (`numbers`)."""
        return functools.partial(_read, self._path(self._numbers[site]))

    @property
    def numbers(self) -> dict[str, int]:
        """Site → number of its file, as far as this process knows. Processes tell each other, by `update`, what they have kept."""
        return self._numbers

    def keep(self, site: str, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one site, in the place of what there was of it.

        Raises:
            OSError: if it cannot be written; what was there before is still there.
        """
        if not self._begun:
            self._begin()
        if site not in self._numbers:  # the lowest that is free, as a damaged file may have been deleted, and no other process's
            taken = set(self._numbers.values())
            self._numbers[site] = next(n for n in itertools.count(self._job.number, self._job.count) if n not in taken)
        path = self._path(self._numbers[site])
        part = path.with_name(path.name + ".part")
        store.write_tensors(part, tensors, metadata={"facts": json.dumps(facts)})
        _make_real(part, path)

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:05d}.safetensors"

    def _begin(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        part = self._directory / (f"{RUN}.{self._job.number}.part" if self._job.count > 1 else f"{RUN}.part")
        part.write_text(json.dumps(self._run, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        _make_real(part, self._directory / RUN)
        self._begun = True


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); without it, its site is computed again") from error


def _read(path: Path, *names: str) -> dict[str, torch.Tensor]:
    with _naming(path), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names or file.keys()}


def fingerprint_of_run(
    model: nn.Module, loader: Iterable[Any], targets: Iterable[str], settings: Mapping[str, Any], job: Job | None = None
) -> dict[str, Any]:
    """What a result depends on: the model's weights (some entries of each), the data (all of them), settings and versions.

    Args:
        model: its weights may be on the disk; of each, 64 entries are read.
        loader: is read to its end.
        targets: names of layers.
        settings: as JSON takes them.
        job: the processes that compute together; of a loader that is not the same for all, every share counts.

    Raises:
        ValueError: if the loader can be read only once.
    """
    if isinstance(loader, Iterator):
        raise ValueError("a checkpoint needs a loader that can be read more than once: a list or a DataLoader, not an iterator")
    packages = ("nullspace-lora", "torch", *(name for name in ("transformers", "triton") if name in sys.modules))
    return {
        "model": {"class": class_of(model).__name__, "weights": _hash_weights(model)},
        "data": hash_data(loader) if (job or Job.alone()).share(loader).split else _hash_shares(loader, job or Job.alone()),
        "targets": _short(hashlib.sha256("\n".join(targets).encode())),
        **settings,
        "device": (execution_device(model) or torch.device("cpu")).type,
        "versions": {name: _version(name) for name in packages},
    }


def _compare(path: Path, run: dict[str, Any]) -> None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    ours = json.loads(json.dumps(run))
    if known == ours:
        return
    keys = [key for key in {**known, **ours} if known.get(key) != ours.get(key)] if isinstance(known, dict) else []
    lines = "".join(f"\n  {key}: {known.get(key)!r} there, {ours.get(key)!r} now" for key in keys)
    raise ValueError(f"{path.parent} is the checkpoint of another run; delete it, or give another directory. It differs in:{lines}")


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        restore_layout(module)
        for key, own in (*module._parameters.items(), *module._buffers.items()):
            if own is None or key in module._non_persistent_buffers_set:
                continue
            value = own if is_sharded(own) else tensor_of(module, key)
            digest.update(f"{name}.{key} {tuple(shape_of(value))} {value.dtype}".encode())
            sample = store.fingerprint(value)
            packed = not value.is_floating_point() or hasattr(value, "quant_state")  # bitsandbytes, in whatever dtype
            if sample is None and packed and value.device.type != "meta":
                sample = store.some_entries(value).cpu().view(torch.uint8)
            if sample is not None:
                digest.update(sample.numpy().tobytes())
    return _short(digest)


def hash_data(loader: Iterable[Any]) -> dict[str, Any]:
    """Which data these are: how many batches, and a digest of all that they hold. The loader is read to its end."""
    digest, batches = hashlib.sha256(), 0
    for batch in loader:
        add_to_digest(digest, batch)
        batches += 1
    return {"batches": batches, "content": _short(digest)}


def _hash_shares(loader: Iterable[Any], job: Job) -> dict[str, Any]:
    shares = job.exchange(hash_data(loader))
    if len(shares) == 1:
        return shares[0]
    content = hashlib.sha256("\n".join(share["content"] for share in shares).encode())
    return {"batches": sum(share["batches"] for share in shares), "content": _short(content)}


def _short(digest: Any) -> str:
    return str(digest.hexdigest()[:16])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _make_real(part: Path, path: Path) -> None:
    store.sync(part)
    part.rename(path)
    store.sync(path.parent)
