"""What an interrupted resident pass keeps: its sums so far, behind which the next run goes on.

A resident pass solves nothing before its last batch, so finished sites alone would be nothing for most of its time. An interrupt
therefore waits for the end of the batch, and all sums are written once. While sites are solved, it waits for those that are being
solved, and the sums of the others are written. A run that is not interrupted writes no sums, and pays nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import signal
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from nullspace.artifacts import records, store
from nullspace.artifacts.checkpoint import Checkpoint
from nullspace.artifacts.sitewise import write_sites
from nullspace.checks import an_object, list_of, text, whole
from nullspace.errors import NullspaceWarning
from nullspace.model.sites import Site
from nullspace.moments.covariance import Covariance

logger = logging.getLogger(__name__)

KIND = "partial sums"
FIELDS = {"sites": list_of(an_object()), "precision": text(), "batches": whole(1), "targets": list_of(text())}


class Interruption:
    """Whether an interrupt is waiting.

    Attributes:
        asked: the signal and the frame of the first one; None without.
    """

    def __init__(self) -> None:
        self.asked: tuple[int, Any] | None = None


@contextlib.contextmanager
def deferred() -> Iterator[Interruption]:
    """Context manager: an interrupt inside is raised at the end of the block. A second one is raised at once.

    Of the handlers of SIGINT, SIGTERM and SIGHUP, those that raise are deferred: Python's, and those with an attribute `raises`.
    """
    interruption = Interruption()
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        if interruption.asked is not None:
            before[number](number, frame)
        interruption.asked = number, frame
        logger.warning("interrupted: what is under way is finished and kept. Interrupt again to end at once")

    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in [int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]:
            handler: Any = signal.getsignal(number)
            if handler is signal.default_int_handler or getattr(handler, "raises", False):
                before[number] = handler
                signal.signal(number, note)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interruption.asked is not None:
        number, frame = interruption.asked
        before[number](number, frame)


class PartialSums:
    """The sums of an interrupted resident pass, in a checkpoint.

    Args:
        kept: the checkpoint; its `run.json` identifies model and data.
        precision: of the pass.
        targets: names of the targets of the pass.
        interruption: says when to stop.

    Attributes:
        batches: that the kept sums are of; 0 if there are none for this pass.

    Warns:
        UserWarning: naming the file, if the sums are damaged: the pass begins anew.
    """

    def __init__(self, kept: Checkpoint, precision: str, targets: Collection[str], interruption: Interruption) -> None:
        self._kept, self._precision, self._targets, self._interruption = kept, precision, targets, interruption
        self._manifest: dict[str, Any] | None = None
        self.batches = 0
        if not (kept.sums / records.MANIFEST).exists():
            return
        try:
            manifest = records.read_manifest(kept.sums, KIND, FIELDS)
            for entry in manifest["sites"]:
                records.check_file(kept.sums, entry["file"], manifest)
        except ValueError as error:
            warnings.warn(
                f"the sums that an interrupted pass has kept are damaged: it begins anew. {error}", NullspaceWarning, stacklevel=2
            )
            return
        if manifest["precision"] == precision and set(targets) <= set(manifest["targets"]):
            self._manifest, self.batches = manifest, manifest["batches"]
            logger.info("%s: the sums of %d batches, of an interrupted run", kept.sums, self.batches)

    @property
    def asked(self) -> bool:
        """Whether an interrupt is waiting."""
        return self._interruption.asked is not None

    def load(self, device: torch.device, precision: Callable[[str], str]) -> Iterator[tuple[Site, Covariance]]:
        """Yields the kept sums of this pass, one site at a time.

        Args:
            device: where they will live.
            precision: name of a site → that of its sums.
        """
        for entry in () if self._manifest is None else self._manifest["sites"]:
            site = Site(tuple(entry["members"]), entry["d_in"])
            if site.name in self._targets:
                tensors = records.read_tensors(self._kept.sums, entry["file"], self._manifest or {})
                yield site, Covariance.from_state(entry, tensors, device=device, precision=precision(site.name))

    def keep(self, batches: int, sites: Iterable[tuple[Site, Covariance]], targets: Collection[str] | None = None) -> None:
        """Write the sums of some batches, in the place of those that are kept. A failure is a warning: an interrupt is waiting.

        Args:
            batches: that they are of, from the first on.
            sites: with their sums.
            targets: that the sums are of, those of the pass by default.

        Warns:
            UserWarning: if they cannot be written.
        """
        began = time.perf_counter()
        content = {"precision": self._precision, "batches": batches, "targets": list(self._targets if targets is None else targets)}
        parts: Iterator[Any] = ((site, *covariance.state(), {}) for site, covariance in sites)
        try:
            self._kept.begin()
            with store.new_directory(self._kept.sums, overwrite=True) as folder:
                write_sites(folder, KIND, parts, content=content)
        except OSError as error:
            warnings.warn(f"the sums so far are not kept: {error}", NullspaceWarning, stacklevel=2)
            return
        logger.info("%s: the sums of %d batches, written in %.1f s", self._kept.sums, batches, time.perf_counter() - began)

    def until_asked(self, stream: Iterator[tuple[Site, Covariance]], batches: int) -> Iterator[tuple[Site, Covariance]]:
        """Yields what the stream of all sums yields, until an interrupt is waiting: then the others are kept, and it ends."""
        left = dict.fromkeys(self._targets)
        while (pair := next(stream, None)) is not None:
            if self.asked:
                self.keep(batches, itertools.chain([pair], stream), left)
                return
            for member in pair[0].members:
                left.pop(member, None)
            drawn = [pair]
            del pair  # the consumer holds the only reference
            yield drawn.pop()


def batches_in(directory: Path) -> int | None:
    """How many batches the kept sums in a checkpoint are of; None if there are none."""
    try:
        return int(records.read_manifest(directory, KIND, FIELDS)["batches"])
    except (OSError, ValueError):
        return None
