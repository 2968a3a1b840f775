"""What the evidence study does, piece by piece: a method with its seeds, or what is done afterwards to what it has changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import preservation
from benchmarks.evidence import methods
from benchmarks.evidence import settings as declared
from benchmarks.evidence.settings import Experiment, Sizes


@dataclass(frozen=True)
class Settings:
    """A study: the model, where the data are, and sizes."""

    model: str
    folder: Path | None
    dtype: str = "float32"
    device: str | None = "cpu"
    triviaqa: str | None = None
    sizes: Sizes = field(default_factory=Sizes)


class Unit(NamedTuple):
    """What one worker does in one go: a method, or what is done afterwards to its trained changes, with all seeds.

    `samples` is 0 and `form` empty where a method takes no calibration. `post` is `none`, `filter` or `intruder`; `kept` are form
    and samples of a filter. `whole`: all questions of NQ-open are asked. `rate_factor`: of the
    method's learning rates, of which the first `first_rates` are run.
    """

    method: str
    task: str
    steps: int
    rank: int
    form: str
    samples: int
    seeds: tuple[int, ...]
    post: str = "none"
    kept: tuple[str, int] = ("", 0)
    whole: bool = True
    first_rates: int = 3
    rate_factor: float = 1.0

    @property
    def rates(self) -> list[float]:
        return [rate * self.rate_factor for rate in methods.EVERY[self.method].rates[: self.first_rates]]

    @property
    def scales(self) -> tuple[float, ...]:
        """At which every change is scored on the validation split."""
        return declared.SCALES if self.post == "none" else declared.SCALES_AFTER

    def run(self, rate: float, seed: int) -> dict[str, Any]:
        names = ("method", "task", "steps", "rank", "form", "samples")
        return {name: getattr(self, name) for name in names} | {"rate": rate, "seed": seed}

    def done_to(self, strength: float = 0.0) -> dict[str, Any]:
        form, samples = self.kept
        return {"how": self.post, "strength": strength} | ({"form": form, "samples": samples} if self.post == "filter" else {})

    @property
    def plain(self) -> Unit:
        """The unit whose learning is the measure: plain LoRA with the same task, steps and rank, at the first two of its rates."""
        return self._replace(method="lora", form="", samples=0, post="none", kept=("", 0), first_rates=2)


def units_of(name: str, experiment: Experiment, sizes: Sizes, seeds: tuple[int, ...], only: list[str] | None) -> list[Unit]:
    """The units of an experiment, plain LoRA first, since the others are measured by it; what is done afterwards comes last."""
    chosen = [each for each in experiment.methods or methods.METHODS if only is None or each in only]
    first = name == "main"
    units: list[Unit] = []
    after: list[Unit] = []
    cells = product(experiment.tasks, experiment.steps, experiment.ranks, chosen, experiment.forms, experiment.samples)
    for task, steps, rank, method, form, given in cells:
        samples, how = given or sizes.samples, methods.EVERY[method]
        own = (form, samples) if "keep" in how.needs else ("", 0)
        unit = Unit(
            method, task, steps, rank, *own, seeds, whole=first, first_rates=experiment.rates, rate_factor=experiment.rate_factor
        )
        units.append(unit)
        if how.filtered and (first or method == "lora"):
            after.append(unit._replace(post="filter", kept=(form, samples)))
        if how.intruder and first:
            after.append(unit._replace(post="intruder"))
    units.sort(key=lambda unit: unit.method != "lora")
    return list(dict.fromkeys([*units, *after]))


def preservation_settings(settings: Settings, unit: Unit) -> preservation.Settings:
    """What `preservation.train` and `load_model` look at."""
    sizes = settings.sizes
    return preservation.Settings(
        model=settings.model, calibrate="", knowledge=(), text=(), train="", test="",
        dtype=settings.dtype, device=settings.device, rank=unit.rank, steps=unit.steps,
        batch_size=sizes.batch_size, accumulation=1, max_length=sizes.max_length,
    )  # fmt: skip
