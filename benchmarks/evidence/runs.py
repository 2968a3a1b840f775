"""A worker of the evidence study: it trains, scores and writes records."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import holding_parts, preservation
from benchmarks.environment import environment
from benchmarks.evidence import allocations, choice, methods, posts
from benchmarks.evidence import settings as declared
from benchmarks.evidence.base import kept, moments, read_reference, reference_file, rounded
from benchmarks.evidence.choice import Curve, Point
from benchmarks.evidence.data import Data
from benchmarks.evidence.units import Settings, Unit, preservation_settings
from benchmarks.holding_parts import Change, Filters, Judge
from nullspace.reporting import study as records

_PATIENCE = 3600.0
"""seconds in which what a unit builds on must appear"""


def key(record: Mapping[str, Any]) -> str:
    """What identifies a scored point."""
    return json.dumps([record["run"], record["post"], record["t"], record["split"]], sort_keys=True)


class Worker:
    """Model, data and calibration of one process."""

    def __init__(self, settings: Settings, out: Path) -> None:
        self.settings, self.out, self.commit = settings, out, environment()["commit"]
        self.lines = preservation.Lines(out / records.RESULTS)
        model, tokenizer = preservation.load_model(preservation_settings(settings, Unit("lora", "gsm8k", 1, 1, "", 0, ())))
        self.model, self.tokenizer = model, tokenizer
        self.data = Data(tokenizer, settings.sizes, settings.folder, settings.triviaqa)
        self._judges: dict[str, Judge] = {}
        self._filters: dict[tuple[str, str, int], Filters] = {}
        self._prepared: dict[tuple[Any, ...], tuple[methods.Prepared, dict[str, torch.Tensor]]] = {}

    def judge(self, task: str) -> Judge:
        """Its probes are named `split probe`."""
        if task not in self._judges:
            self._judges.clear()
            keep = kept(self.out, declared.FORM, self.settings.sizes.samples)
            targets = [name for site in keep.sites for name in site.members]
            probes, reference = {}, {}
            for split, of_split in (("validation", self.data.validation(task)), ("test", self.data.test(task))):
                for name, probe in of_split.items():
                    probes[f"{split} {name}"] = probe
                    reference[f"{split} {name}"] = read_reference(reference_file(self.out, task, split, name), probe)
            self._judges[task] = Judge(self.model, probes, targets, keep, reference)
        return self._judges[task]

    def work(self, unit: Unit) -> None:
        """Train, score on the validation split, choose, and score what is chosen on the test split: what is missing of it."""
        for seed in unit.seeds:
            for rate in unit.rates:
                if unit.post == "none":
                    self._train(unit.run(rate, seed), unit)
                if unit.post != "intruder":
                    self._validate(unit, rate, seed)
        for seed in unit.seeds:
            if unit.post == "intruder":
                self._validate(unit, self._chosen_rate(unit, seed), seed)
            self._report(unit, seed)

    # Training

    def _change_file(self, run: Mapping[str, Any]) -> Path:
        return self.out / "changes" / ("-".join(str(value).replace(" ", "_") for value in run.values()) + ".safetensors")

    def _change(self, run: Mapping[str, Any]) -> Change:
        return holding_parts.read_change(self._change_file(run))[0]

    def _train(self, run: Mapping[str, Any], unit: Unit) -> None:
        path = self._change_file(run)
        if path.exists():
            return
        began = time.perf_counter()
        prepared = self._start(unit, run["seed"])
        started = time.perf_counter()
        train = self.data.examples(declared.TASKS[unit.task].train)
        losses = preservation.train(
            prepared.model,
            self.tokenizer,
            preservation.Data([], {}, {}, train, [], []),
            preservation_settings(self.settings, unit),
            run["rate"],
            run["seed"],
            weight_decay=prepared.weight_decay,
            callbacks=prepared.callbacks,
        )
        change = {
            name: type(delta)(*(part.cpu() for part in delta)) if isinstance(delta, tuple) else delta.cpu()
            for name, delta in methods.change_of(prepared).items()
        }
        holding_parts.write_change(path, change, {})
        seconds = {"start": started - began, "train": time.perf_counter() - started}
        self.lines.write({"kind": "run", "run": dict(run), "train_losses": losses, "seconds": seconds, "commit": self.commit})
        if unit.method in methods.BUDGETED:
            self.lines.write({"kind": "ranks", "run": dict(run), **allocations.summary(prepared.model)})
        print(
            f"trained {path.stem}: {losses[0]:.3f} to {losses[-1]:.3f}, {seconds['start']:.0f} + {seconds['train']:.0f} s",
            flush=True,
        )

    def _start(self, unit: Unit, seed: int) -> methods.Prepared:
        """A model with adapters; where the data alone decide how they start, that of the last unit again, put back to its start."""
        method = methods.EVERY[unit.method]
        key = (*unit._replace(seeds=(), whole=True, steps=0, first_rates=0), None if method.start else seed)
        if key in self._prepared:
            prepared, start = self._prepared[key]
            for name, parameter in prepared.model.named_parameters():
                if name in start:
                    parameter.data.copy_(start[name])
            return prepared
        self._prepared.clear()
        model, _ = preservation.load_model(preservation_settings(self.settings, unit))
        prepared = methods.prepare(
            model,
            unit.method,
            rank=unit.rank,
            seed=seed,
            keep=kept(self.out, unit.form, unit.samples) if "keep" in method.needs else None,
            task=moments(self.out, f"task {unit.task}") if "task" in method.needs else None,
        )
        if method.start:
            start = {name: p.detach().clone() for name, p in prepared.model.named_parameters() if "lora_" in name}
            self._prepared[key] = prepared, start
        return prepared

    # Scoring

    def _made(self, unit: Unit, run: Mapping[str, Any], strength: float) -> Change:
        """The change of a run after what is done to it."""
        change = self._change(run)
        if unit.post == "filter":
            name = (unit.task, *unit.kept)
            if name not in self._filters:
                self._filters.clear()
                self._filters[name] = Filters(moments(self.out, f"task {unit.task}"), kept(self.out, *unit.kept))
            return self._filters[name].of(change, strength)
        if unit.post == "intruder":
            return self._intruder(run, change)
        return change

    def _intruder(self, run: Mapping[str, Any], change: Change) -> Change:
        path = self._change_file({**run, "post": "intruder"})
        if not path.exists():
            model, _ = preservation.load_model(preservation_settings(self.settings, Unit("lora", "", 1, run["rank"], "", 0, ())))
            holding_parts.write_change(path, posts.intruder(model, change), {})
        return holding_parts.read_change(path)[0]

    def _validate(self, unit: Unit, rate: float, seed: int) -> None:
        if unit.post != "none":
            self._await(lambda: self._change_file(unit.run(rate, seed)).exists(), f"the training of {unit.method}")
        for strength in declared.STRENGTHS if unit.post == "filter" else (0.0,):
            for t in unit.scales:
                self._score(unit, unit.run(rate, seed), strength, t, "validation")

    def _score(self, unit: Unit, run: Mapping[str, Any], strength: float, t: float, split: str, level: float | None = None) -> None:
        record = {"kind": "score", "run": dict(run), "post": unit.done_to(strength), "t": t, "split": split}
        if key(record) in {key(each) for each in self._scored()}:
            return
        judge = self.judge(unit.task)
        began = time.perf_counter()
        change = self._made(unit, run, strength)
        judge.take(change, t)
        made = time.perf_counter()
        scores = {name: self._scores(judge, name, unit, split) for name in self._names(judge, split)}
        drift = judge.drift(change, t)
        judge.take({})
        seconds = {"make": made - began, "score": time.perf_counter() - made}
        self.lines.write({**record, "level": level, "scores": scores, "drift": drift, "seconds": seconds, "commit": self.commit})
        brief = " ".join(f"{name} {each['loss' if name == 'task' else 'kl']:.4f}" for name, each in scores.items())
        print(
            f"{split} {self._change_file(run).stem} {unit.post} {strength:g} t {t:g}: {brief} ({sum(seconds.values()):.0f} s)",
            flush=True,
        )

    def _names(self, judge: Judge, split: str) -> list[str]:
        return [name.partition(" ")[2] for name in judge.probes if name.startswith(split)]

    def _scores(self, judge: Judge, name: str, unit: Unit, split: str) -> dict[str, Any]:
        fewer = split == "test" and name == "nq" and not unit.whole
        scored = judge.scored(f"{split} {name}", self.settings.sizes.fewer_questions if fewer else None)
        scores: dict[str, Any] = {**holding_parts.in_short(scored), "tokens": sum(scored.tokens)}
        if split == "test" and name in self.data.sets:
            scores["rows"] = {"log_likelihood": rounded(scored.log_likelihood), "kl": rounded(scored.divergence)}
            if self.settings.sizes.answered:
                scores["exact_match"] = self.data.exact_match(self.model, name)
        return scores

    # Choosing

    def _scored(self) -> list[dict[str, Any]]:
        return [record for record in self.lines.read() if record["kind"] == "score"]

    def _await(self, there: Callable[[], Any], what: str) -> None:
        until = time.monotonic() + _PATIENCE
        while not there():
            if time.monotonic() > until:
                raise TimeoutError(f"waited {_PATIENCE:.0f} s for {what}")
            time.sleep(2)

    def points(self, unit: Unit, seed: int) -> dict[tuple[float, float], list[Point]]:
        """(rate, strength) → what is scored on the validation split."""
        points: dict[tuple[float, float], list[Point]] = {}
        for record in self._scored():
            run, strength = record["run"], record["post"]["strength"]
            own = run == unit.run(run["rate"], seed) and record["post"] == unit.done_to(strength)
            if own and record["split"] == "validation":
                point = Point(record["t"], record["scores"]["task"]["loss"], record["scores"]["nq"]["kl"])
                points.setdefault((run["rate"], strength), []).append(point)
        return points

    def curves(self, unit: Unit, seed: int) -> dict[tuple[float, float], Curve]:
        """(rate, strength) → the curve over scales, on the validation split."""
        base = self.base_loss(unit.task)
        return {key: choice.curve(base, each) for key, each in self.points(unit, seed).items()}

    def base_loss(self, task: str) -> float:
        of = (
            each for each in self.lines.read() if each["kind"] == "base" and (each["task"], each["split"]) == (task, "validation")
        )
        return float(next(of)["scores"]["task"]["loss"])

    def _plain(self, unit: Unit, seed: int) -> list[Curve]:
        """The curves of plain LoRA, as soon as all of its points are there."""
        wanted = {(rate, t) for rate in unit.plain.rates for t in unit.plain.scales}

        def complete() -> bool:
            there = {
                (each["run"]["rate"], each["t"])
                for each in self._scored()
                if each["run"] == unit.plain.run(each["run"]["rate"], seed) and each["post"]["how"] == "none"
            }
            return wanted <= there

        self._await(complete, f"plain LoRA with {unit.steps} steps on {unit.task}, rank {unit.rank}, seed {seed}")
        return [each for (rate, _), each in self.curves(unit.plain, seed).items() if rate in unit.plain.rates]

    def _chosen(self, unit: Unit, seed: int, plain: list[Curve]) -> choice.Chosen | None:
        loss = choice.target(self.base_loss(unit.task), plain, declared.LEVEL)
        return choice.chosen(self.curves(unit, seed), loss)

    def _chosen_rate(self, unit: Unit, seed: int) -> float:
        """At which the change is reported to which something is done afterwards."""
        plain = self._plain(unit, seed)
        chosen = self._chosen(unit._replace(post="none", kept=("", 0)), seed, plain)
        assert chosen is not None  # plain LoRA reaches what it learns
        rate: float = chosen.key[0]  # type: ignore[index]
        return rate

    def _report(self, unit: Unit, seed: int) -> None:
        """Score the chosen point on the test split, or say how near the method came.

        A point between the scales is scored on the validation split before it is relied on, once for each rate and strength.
        """
        plain = self._plain(unit, seed)
        while (chosen := self._chosen(unit, seed, plain)) is not None:
            rate, strength = chosen.key  # type: ignore[misc]
            if any(point.t not in unit.scales for point in self.points(unit, seed)[rate, strength]):
                self._score(unit, unit.run(rate, seed), strength, chosen.t, "test", declared.LEVEL)
                return
            self._score(unit, unit.run(rate, seed), strength, between(chosen.t, unit.scales), "validation")
        run = {name: value for name, value in unit.run(0.0, seed).items() if name != "rate"}
        reached = choice.share(self.base_loss(unit.task), plain, self.curves(unit, seed).values())
        missed = {"kind": "missed", "run": run, "post": unit.done_to(), "level": declared.LEVEL, "reached": reached}
        if missed not in self.lines.read():
            self.lines.write(missed)
            print(f"{unit.method} {unit.post} seed {seed} reaches {reached:.3f} of what LoRA learns", flush=True)


def between(t: float, scales: tuple[float, ...]) -> float:
    """A scale that is not one of those that are scored anyway: `t`, or just below it."""
    return t if t not in scales else t - choice.STEP


_worker: Worker | None = None


def start_worker(settings: Settings, out: Path, threads: int) -> None:
    """In a process of its own, once."""
    global _worker
    torch.set_num_threads(threads)
    _worker = Worker(settings, out)


def work(unit: Unit) -> str | None:
    """In such a process: what has failed, if anything has."""
    assert _worker is not None
    try:
        _worker.work(unit)
    except Exception:
        return f"{unit}:\n{traceback.format_exc()}"
    return None
