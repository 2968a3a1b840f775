"""What a fine-tuned model still knows, after a filter or a merge, against scaling its change down.

    python -m benchmarks.holding --out held --data FOLDER                # SmolLM2-135M, one CPU thread, hours
    python -m benchmarks.holding --out held --show                       # the tables of what is finished

The models, data, sizes and training are those of `benchmarks.preservation --reduced`. What must be kept is calibrated on NQ-open's
*train* part, in three forms (`holding_parts.FORMS`): plain text; half of the trace in the few-shot form in which the knowledge
questions are asked; half in the template of the task. The task's moments are of 16 training examples. Scored are the task (loss on
held-out examples), NQ-open's dev part and WebQuestions in both forms of asking, HumanEval's solutions and WikiText: the
log-likelihood of what is right, and KL(base ‖ model) at the same tokens. WebQuestions, HumanEval and WikiText are never calibrated.

A  plain LoRA of several seeds and rates: scaled, filtered; `forms`: filtered with what must be kept in the other forms.
B  a model trained whole: its linear layers' change scaled, filtered.
C  two adapters, of GSM8K and of MBPP, in one: `factors.combined` against PEFT's merges.

OUT/results.jsonl gets a line when a variant is scored: `kind` `score`, `part`, `run` (method, rate, seed), `variant` (`how`, and
what it depends on), `scores`, `drift`. The same command resumes. OUT/changes holds what each run has changed, OUT/moments the
calibration.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model

from benchmarks import holding_parts as parts
from benchmarks import holding_tables, preservation
from benchmarks.environment import environment
from benchmarks.holding_parts import Change, Filters, Judge, Sizes
from nullspace import analysis
from nullspace.factors import LowRank
from nullspace.reporting import study as fronts

STRENGTHS = (0.1, 1.0, 10.0)
RATES = (2e-3, 8e-3)
WHOLE_RATES = (5e-5, 2e-5)
# PEFT's, with the scale of the sum.
MERGES = [("cat", 1.0), ("cat", 0.5), ("linear", 1.0), ("ties", 1.0), ("dare_linear", 1.0), ("dare_ties", 1.0), ("svd", 1.0)]
CODE = "lora on code"
# What is scored: HumanEval and WikiText, like WebQuestions, are not calibrated on.
NAMES = ["task", "nq", "webq", "humaneval", "wikitext"]
TEMPLATES = ["nq, template", "webq, template"]


class Run(NamedTuple):
    """One training."""

    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method} lr{self.rate:g} seed{self.seed}"


class Variant(NamedTuple):
    """What is done to the change of a run, and whose inputs are kept in which form."""

    how: str
    scale: float = 1.0
    strength: float = 0.0
    form: str = ""
    rank: int = 0


class Study:
    """What all parts need, made once: model, data, calibration, records."""

    def __init__(self, settings: preservation.Settings, sizes: Sizes, folder: Path, out: Path) -> None:
        self.settings, self.out, self.commit = settings, out, environment()["commit"]
        self.lines = preservation.Lines(out / fronts.RESULTS)
        self.done = {holding_tables.key(record) for record in self.lines.read() if record["kind"] == "score"}
        model, self.tokenizer = preservation.load_model(settings)
        self.data = preservation.load_data(settings, self.tokenizer)
        longest = settings.max_length
        self.code = parts.code_examples(folder / "mbpp.jsonl", self.tokenizer, longest, range(511, 975), settings.pool)
        solved = parts.code_examples(folder / "mbpp.jsonl", self.tokenizer, longest, range(11, 511), settings.examples)
        parts.calibrate(model, self.tokenizer, self.data, settings, sizes, self.code, out)
        self.probes = parts.probes_of(self.data, self.tokenizer, folder, sizes) | {"mbpp": parts.Probe(solved, [])}
        self.targets = [name for site in parts.moments(out, "text").sites for name in site.members]
        self.judge = Judge(model, self.probes, self.targets, parts.kept_moments(out, parts.FORM))
        self._filters: tuple[str, Filters] | None = None
        if not any(record["kind"] == "base" for record in self.lines.read()):
            self.lines.write({"kind": "base", "scores": self.judge.scores(list(self.probes))})

    def filters(self, form: str) -> Filters:
        """Those of one form at a time: 1.6 GB."""
        if self._filters is None or self._filters[0] != form:
            self._filters = None
            self._filters = form, Filters(parts.moments(self.out, "task"), parts.kept_moments(self.out, form))
        return self._filters[1]

    def score(
        self, part: str, run: str, variant: Variant, make: Callable[[], Change], names: list[str], others: Any = None
    ) -> None:
        """Write the record of a variant, unless it is there."""
        record = {"kind": "score", "part": part, "run": run, "variant": variant._asdict(), "commit": self.commit}
        if holding_tables.key(record) in self.done:
            return
        began = time.perf_counter()
        change = make()
        made = time.perf_counter()
        self.judge.take(change, variant.scale, others)
        scores, drift = self.judge.scores(names), self.judge.drift(change, variant.scale)
        seconds = {"make": made - began, "score": time.perf_counter() - made}
        self.lines.write({**record, "scores": scores, "drift": drift, "seconds": seconds})
        self.done.add(holding_tables.key(record))
        brief = " ".join(f"{name} {each['loss' if name == 'task' else 'kl']:.4f}" for name, each in scores.items())
        print(f"{part} {run} {variant}: {brief} ({sum(seconds.values()):.0f} s)", flush=True)

    def variants(self, part: str, run: str, wanted: list[Variant], change: Change, names: list[str], others: Any = None) -> None:
        for variant in wanted:

            def make(variant: Variant = variant) -> Change:
                return self.filters(variant.form).of(change, variant.strength) if variant.strength else change

            self.score(part, run, variant, make, names, others)

    def trained(self, run: Run) -> tuple[Change, dict[str, torch.Tensor]]:
        """The change of a run, and the other parameters that it trained: from its file, or trained now."""
        path = self.out / "changes" / f"{run.name.replace(' ', '-')}.safetensors"
        if not path.exists():
            began = time.perf_counter()
            change, others, losses = self._train(run)
            parts.write_change(path, change, others)
            seconds = time.perf_counter() - began
            self.lines.write({"kind": "run", "run": run.name, **run._asdict(), "train_losses": losses, "seconds": seconds})
            print(f"trained {run.name} in {seconds:.0f} s, loss {losses[0]:.3f} to {losses[-1]:.3f}", flush=True)
        return parts.read_change(path)

    def _train(self, run: Run) -> tuple[Change, dict[str, torch.Tensor], list[float]]:
        model, _ = preservation.load_model(self.settings)
        data = self.data._replace(train=self.code) if run.method == CODE else self.data
        if run.method != "whole":
            torch.manual_seed(run.seed)
            model = get_peft_model(model, preservation.config_of(model, self.settings))
            before = parts.factors_of(model)
        losses = preservation.train(model, self.tokenizer, data, self.settings, run.rate, run.seed)
        if run.method != "whole":
            after = parts.factors_of(model)
            return {name: analysis.update(before[name], after[name]) for name in after}, {}, losses
        weights = {f"{name}.weight": name for name in self.targets}
        change: dict[str, LowRank | torch.Tensor] = {}
        others = {}
        for name, parameter in model.named_parameters():
            if name in weights:
                change[weights[name]] = parameter.detach() - self.judge.base[name]
            else:
                others[name] = parameter.detach()
        return change, others, losses


def scaled_and_filtered(scales: Sequence[float], strengths: Sequence[float]) -> list[Variant]:
    return [
        Variant("trained"),
        *(Variant("scaled", scale) for scale in scales),
        *(Variant("filtered", 1.0, strength, parts.FORM) for strength in strengths),
    ]


def plain(study: Study, seeds: list[int]) -> None:
    """A. The higher rate trains too far: smaller scales and stronger filters suit it."""
    far = [*scaled_and_filtered((0.5, 0.3), STRENGTHS[1:]), Variant("filtered", 0.6, 1.0, parts.FORM)]
    in_both = (Variant("trained"), Variant("scaled", 0.5), Variant("filtered", 1.0, 1.0, parts.FORM))
    for rate, wanted in zip(RATES, (scaled_and_filtered((0.75, 0.5, 0.3), STRENGTHS), far), strict=True):
        for run in (Run("lora", rate, seed) for seed in seeds):
            change, _ = study.trained(run)
            for variant in wanted:
                study.variants("A", run.name, [variant], change, NAMES + (TEMPLATES if variant in in_both else []))


def forms(study: Study, seeds: list[int]) -> None:
    """A, with what must be kept in other forms."""
    for rate in RATES:
        for form in ("template", "plain"):
            for run in (Run("lora", rate, seed) for seed in seeds):
                variant = Variant("filtered", 1.0, 1.0, form)
                study.variants("A", run.name, [variant], study.trained(run)[0], NAMES + TEMPLATES)


def whole(study: Study, seeds: list[int]) -> None:
    """B. The embedding and the norms stay as they were tuned; `rest` has them alone."""
    for rate in WHOLE_RATES:
        run = Run("whole", rate, seeds[0])
        change, others = study.trained(run)
        study.variants("B", run.name, scaled_and_filtered((0.75, 0.5, 0.3), STRENGTHS), change, NAMES, others)
        study.score("B", run.name, Variant("rest"), dict, NAMES, others)


def merging(study: Study, seeds: list[int]) -> None:
    """C."""
    names = ["task", "mbpp", "nq", "webq", "wikitext"]
    runs = [Run("lora", RATES[0], seeds[0]), Run(CODE, RATES[0], seeds[0])]
    changes = [study.trained(run)[0] for run in runs]
    for run, change in zip(runs, changes, strict=True):
        study.variants("C", run.name, [Variant("trained")], change, names)
    rank = study.settings.rank
    for strength, wide in ((1.0, 2 * rank), (0.1, 2 * rank), (0.1, rank)):

        def combine(strength: float = strength, wide: int = wide) -> Change:
            return parts.combined(study.out, changes, ["task", "code"], strength, wide)

        study.score("C", "both", Variant("combined", 1.0, strength, parts.FORM, wide), combine, names)
    model, _ = preservation.load_model(study.settings)
    for how, scale in MERGES:

        def merge(how: str = how) -> Change:
            return parts.merged_by_peft(model, changes, how, (1.0, 1.0), seeds[0])

        study.score("C", "both", Variant(how, scale), merge, names)


PARTS = {"A": plain, "forms": forms, "B": whole, "C": merging}


def begin(settings: preservation.Settings, sizes: Sizes, out: Path) -> None:
    """The first line, unless it is there."""
    out.mkdir(parents=True, exist_ok=True)
    lines = preservation.Lines(out / fronts.RESULTS)
    lines.mend()
    if not lines.read():
        shown = {**asdict(settings), "threads": torch.get_num_threads(), "sizes": sizes._asdict()}
        lines.write({"kind": "study", "settings": shown, "environment": environment()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("holding"))
    parser.add_argument("--data", type=Path, help="folder of files: see `benchmarks.preservation`, mbpp.jsonl and humaneval.jsonl")
    parser.add_argument("--model", help="hub name or folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few tokens of everything: whether it runs")
    parser.add_argument("--show", action="store_true", help="print the tables of what is finished, and stop")
    options = parser.parse_args()
    if options.show:
        print(holding_tables.page(options.out / fronts.RESULTS))
        return
    if options.data is None:
        parser.error("--data is needed")
    torch.set_num_threads(1)
    settings, sizes = settings_of(options), Sizes()
    if options.quick:
        settings = replace(settings, samples=2, length=64, steps=4, max_length=1000, questions=2, examples=2, windows=1, window=32)
        sizes = Sizes(3, 3, 2, 2, 2, 1000)
    begin(settings, sizes, options.out)
    study = Study(settings, sizes, options.data, options.out)
    for part in options.parts:
        PARTS[part](study, options.seeds)
    print(holding_tables.page(options.out / fronts.RESULTS))


def settings_of(options: argparse.Namespace) -> preservation.Settings:
    """Those of `preservation --reduced`, with two windows of WikiText."""

    def source(name: str) -> str:
        return str(options.data / preservation.KNOWN[name][0])

    model = options.model
    if model is None:
        from benchmarks.peers import checkpoint_of_demo_model

        model = checkpoint_of_demo_model(Path(".venv") / "smollm2-135m")
    return preservation.Settings(
        model=model,
        calibrate=source("nq-train"),
        knowledge=(("nq", source("nq")), ("webq", source("webq"))),
        text=(("wikitext", source("wikitext")),),
        train=source("gsm8k-train"),
        test=source("gsm8k-test"),
        **{**preservation.REDUCED, "windows": 2, "layers": False},
    )


if __name__ == "__main__":
    main()
