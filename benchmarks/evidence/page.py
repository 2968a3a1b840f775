"""The page of the evidence (`docs/evidence.md`), its picture, and the table of choices in `docs/methods.md`, from the records.

    python -m benchmarks.evidence.page [RECORDS] [--page docs/evidence.md] [--methods docs/methods.md] [--picture FILE]

Every number and every sentence about which method is ahead follows from the records. The same records give the same page.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS
from benchmarks.evidence import figure, findings, names, sceptic, tables
from benchmarks.evidence import settings as declared
from benchmarks.evidence.findings import listed
from benchmarks.evidence.names import FORMS, MODELS, PROBES, TASKS
from benchmarks.evidence.statistics import LORA, RESAMPLES, Cell, Comparison, Evidence, evidence
from benchmarks.evidence.tables import markdown
from nullspace.errors import InputError
from nullspace.reporting.study import read_records

ROOT = Path(__file__).parents[2]
RECORDS = RESULTS / "evidence-cpu.jsonl"
PAGE, METHODS, PICTURE = (ROOT / "docs" / name for name in ("evidence.md", "methods.md", "images/evidence.svg"))


class Compared:
    """All cells of the records: that of the main table, and those that differ from it in one thing."""

    def __init__(self, found: Evidence) -> None:
        self.found, self.level = found, found.level()
        cells = {cell: Comparison(found, cell, self.level) for cell in found.cells()}
        self.cells = {cell: each for cell, each in cells.items() if each.points}
        self.main = max(self.cells.values(), key=lambda each: len(each.points))
        if LORA not in self.main.points or not self.main.questions:
            raise InputError(
                "the records have no plain LoRA of the test split yet, question by question: the page compares with it"
            )

    def beside(self, field: str) -> dict[Cell, Comparison]:
        """Cells that differ from the main one in this field alone."""
        same = self.main.cell._replace(**{field: None})
        return {c: each for c, each in self.cells.items() if c != self.main.cell and c._replace(**{field: None}) == same}


def command(experiment: str) -> str:
    return f"`python -m benchmarks.evidence --out OUT --data FOLDER --experiments {experiment}`"


def page(records: list[dict[str, Any]], name: str) -> str:
    """The whole page, from the records of a file of this name."""
    compared = Compared(evidence(records))
    sections = (_measured, _main, _picture, _factors, _whom, _starts, _behind, _weak, _left_out)
    return "\n\n".join(["# Evidence", _asked(compared, name), *(section(compared) for section in sections)]) + "\n"


def with_choices(text: str, compared: Compared) -> str:
    """The page of methods with the table of what was compared in the place of the one that it has.

    Raises:
        ValueError: if it has none.
    """
    table = findings.whom(compared.main)
    known = rf"^\| {re.escape(table[0][0])} \|.*\n(?:\|.*\n)+"
    made, number = re.subn(known, lambda _: f"{markdown(table)}\n", text, flags=re.MULTILINE)
    if number != 1:
        raise InputError("the page of methods has no table that begins with 'what there is'")
    return made


def _asked(compared: Compared, name: str) -> str:
    main = compared.main
    return f"""How much of what a model knew does each method keep, where all of them have learned as much? All methods may scale
their change after training, which is free. Rates, strengths and scales are chosen on other data than those that are reported.

{" ".join(filter(None, (findings.answer(main), findings.wider(main, compared.beside("form")))))}

{findings.resolved(main)} What all of this does not show is [below](#what-is-weak-here-and-what-would-settle-it). This page is
made by `python -m benchmarks.evidence.page` from `benchmarks/results/{name}`; the wording follows from the numbers."""


MEASURED = """## How it was measured

*Not run by the tests: it trains for hours.*

```sh
python -m benchmarks.evidence --out OUT --data FOLDER --workers 2 --experiments main forms tasks longer samples ranks
python -m benchmarks.evidence.page OUT/results.jsonl
```

- **Model and training**: {model}, {task}, {steps} steps of {batch} examples by transformers' `Trainer`, rank {rank} on all linear
  layers but the head (where a method does not name others), seeds {seeds}{machine}.
- **Calibration**: what must be kept is calibrated on NQ-open's *train* part; in the main table on {form}, with equal trace,
  {samples} samples each, the same for all methods that take any; the task on {of_task} training examples. {others}
  are not calibrated on (but for the forms with WikiText, its train part).
- **What is chosen**: every run, of {rates} rates a method, is scored on a validation split (other examples of the task;
  questions of NQ-open's train part on which nothing was calibrated) at t = {scales} times its change, and, filtered with strengths
  {strengths}, at t = {after}. For each method and seed, that rate, strength and t (interpolated between these) which reaches
  the target with the least KL there is scored on the test split, and nothing else is. {third}
- **Equal learning**: the target of a seed is base loss − {level:g} · (base loss − the lowest loss of plain LoRA over rate and t),
  on the validation split. On the test split the task losses then are {unequal}.
- **KL**: KL(base ‖ model), nats a token of the gold answers; {counts}; the mean of the sets. *Forgotten*: how many nats an answer
  has become less likely.
- **Intervals**: 95 %, in brackets, over {resamples:,} resamples of the questions, the same for all methods and seeds, so that
  differences and ratios are paired. They contain what other questions of the same sets would change, and no training noise: that
  is in the column *over seeds* (least to largest, and standard deviation). Ratios are geometric means over the seeds' ratios. Two
  methods are told apart where the interval of their ratio, with the seeds resampled too, leaves out 1.
- **The same numbers again**: run a part into another folder (`--out AGAIN --methods lora contrast --seeds 0`), then
  `python -m benchmarks.evidence --out AGAIN --compare OUT` says whether all numbers that both have are the same to the last bit."""


THIRD_RUN = """Where two rates
  left the choice at an end, or missed the target, a third one is run after they have been reported."""
THIRD_DECLARED = """A third rate is
  declared for most methods, for where two leave the choice at an end or miss the target; none has been run yet."""


def _measured(compared: Compared) -> str:
    settings, environment, main = compared.found.settings, compared.found.environment, compared.main
    sizes = settings["sizes"]
    cell = main.cell
    packages = [f"{key} {environment['versions'][key]}" for key in ("torch", "transformers", "peft") if "versions" in environment]
    machine = ", ".join(filter(None, [environment.get("gpu") or environment.get("cpu"), *packages]))
    seeds = sorted({seed for points in main.points.values() for seed in points})
    return MEASURED.format(
        model=MODELS.get(settings["model"], settings["model"]),
        task=TASKS.get(cell.task, cell.task),
        steps=cell.steps,
        rank=cell.rank,
        seeds=listed(map(str, seeds)),
        machine=f" ({machine})" if machine else "",
        form=FORMS.get(cell.form, cell.form),
        samples=cell.samples,
        others=listed(text for probe, text in PROBES.items() if probe in main.base and not probe.startswith("nq")),
        batch=sizes["batch_size"],
        of_task=sizes["of_task"],
        rates=findings.rates(compared.found, cell),
        third=THIRD_RUN if "three" in findings.rates(compared.found, cell) else THIRD_DECLARED,
        scales=listed(f"{scale:g}" for scale in declared.SCALES),
        strengths=listed(f"{strength:g}" for strength in declared.STRENGTHS),
        after=listed(f"{scale:g}" for scale in declared.SCALES_AFTER),
        level=main.level,
        unequal=findings.unequal(main),
        counts=listed(f"{number:,} questions of {PROBES[each]}" for each, number in main.questions.items()),
        resamples=RESAMPLES,
    )


def _main(compared: Compared) -> str:
    main = compared.main
    parts = [f"## Forgetting at equal learning\n\n{command('main')}", markdown(tables.main(main))]
    if sentence := findings.no_intruders(main):
        parts.append(sentence)
    if main.missed:
        parts += ["These do not learn as much at any of their rates and t ≤ 1.2:", markdown(tables.missing(main))]
    parts += [
        "How much less likely the gold answers have become; what is negative has become likelier:",
        markdown(tables.forgotten(main)),
        "### Where nothing was calibrated\n\nThe same models: KL over that of LoRA (geometric mean over seeds) on questions in "
        "other forms, on code, instructions and running text (in brackets the least and the largest seed); the median drift "
        f"‖ΔW X‖ / ‖W₀ X‖ on the calibrated inputs. {sceptic.few(compared.found)}",
        markdown(tables.elsewhere(main)),
        "What the losses themselves do there (negative: better than the base):",
        markdown(tables.abilities(main)),
    ]
    return "\n\n".join(parts)


def _picture(_: Compared) -> str:
    return """## The fronts

![KL to the base on knowledge questions against the share of LoRA's learning](images/evidence.svg)

The least KL of each method over its rates, strengths and scales, for every amount of learning; on the *validation* split, where
the choice is made; geometric mean over seeds. A line ends where one of its seeds learns no more. Dashed: filtered. The grey line
is the learning at which the tables compare."""


# Field of a cell → title, experiment, what the table shows.
FACTORS = {
    "form": ("Calibration: the form", "forms", "KL over that of the first calibration; in brackets each seed."),
    "samples": ("Calibration: the number of samples", "samples", "KL over that of the first number; in brackets each seed."),
    "task": ("Other tasks", "tasks", "KL at equal learning of each task."),
    "steps": ("Longer training", "longer", "KL at equal learning; LoRA with as many steps."),
    "rank": ("Ranks", "ranks", "KL at equal learning; LoRA of the same rank."),
}


def _factors(compared: Compared) -> str:
    parts = ["## Factors"]
    for field, (title, experiment, what) in FACTORS.items():
        others = compared.beside(field)
        if not others:
            continue
        make = tables.factors if field in ("form", "samples") else tables.across
        parts += [f"### {title}\n\n{command(experiment)}", what, markdown(make(compared.main, others))]
        if field == "form":
            parts += [
                "Which form of asking each form of calibration keeps (KL over LoRA's on the same questions):",
                markdown(tables.kept_forms(compared.main, others)),
            ]
    return "\n\n".join(parts) if len(parts) > 1 else "## Factors\n\nOnly the main table has been measured so far."


def _whom(compared: Compared) -> str:
    return f"""## Which method for whom

From the main table: the way with the least KL of those that a situation allows, and the next.

{markdown(findings.whom(compared.main))}

How to use them: [Keeping what is known](holding.md)."""


def _starts(compared: Compared) -> str:
    lines = [f"- {sentence}" for sentence in (*findings.starts(compared.main), findings.drifts(compared.main)) if sentence]
    return "## What a start alone does, and what it does not\n\n" + "\n".join(lines)


def _behind(compared: Compared) -> str:
    return f"""## Where calibration is not ahead

By what is asked, at equal learning (geometric means over seeds). A method that calibrates lowers what its update reads of the
calibrated inputs; on inputs unlike them nothing holds it.

{markdown(findings.behind(compared.main))}

{findings.slow(compared.found, compared.main)}""".rstrip()


def _weak(compared: Compared) -> str:
    return f"""## What is weak here, and what would settle it

{markdown(sceptic.weaknesses(compared.found, compared.main))}"""


def _left_out(compared: Compared) -> str:
    unmeasured = [
        f"{title[0].lower()}{title[1:]} (`--experiments {experiment}`)"
        for field, (title, experiment, _) in FACTORS.items()
        if not compared.beside(field)
    ]
    ways = {way.method for way in (*compared.main.points, *compared.main.missed)}
    without = [each.label for name, each in names.METHODS.items() if name not in ways]
    lines = [*sceptic.LEFT_OUT, *([f"Not measured yet: {listed(unmeasured)}."] if unmeasured else [])]
    lines += [f"Declared in `benchmarks/evidence/methods.py`, and not run in the main table: {listed(without)}."] if without else []
    return "## What was left out\n\n" + "\n".join(f"- {line}" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="?", default=RECORDS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--methods", type=Path, default=METHODS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    records = read_records(options.records)
    options.page.write_text(page(records, options.records.name), encoding="utf-8")
    compared = Compared(evidence(records))
    options.methods.write_text(with_choices(options.methods.read_text(encoding="utf-8"), compared), encoding="utf-8")
    figure.write(compared.found, compared.main.cell, compared.level, options.picture)


if __name__ == "__main__":
    main()
