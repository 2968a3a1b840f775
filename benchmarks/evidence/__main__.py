"""The evidence study: every method on the same data, compared at equal learning. `docs/evidence.md` is made of its records.

    python -m benchmarks.evidence --out study --data FOLDER --workers 2                    # SmolLM2-135M, two CPU cores, hours
    python -m benchmarks.evidence --out study --data FOLDER --experiments main --methods lora contrast --seeds 0
    python -m benchmarks.evidence --out again --compare study           # of a part that was run again: the same numbers?

A *run* trains one method. What training has changed is scored at several scales on the validation split (`settings`); of all rates,
strengths of a filter, and scales, the one that reaches the target with the least KL to the base there is scored on the test split.
The target is a share of what plain LoRA learns at best, for each seed. OUT/results.jsonl gets a line a record (their fields:
`statistics`); the same command resumes. OUT/changes holds what each run has changed, OUT/moments the calibration, OUT/reference the
base's log-probabilities.

FOLDER holds the files of `data.SOURCES`; what it lacks is read from the hub.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

from benchmarks import preservation
from benchmarks.environment import environment
from benchmarks.evidence import base, methods, runs
from benchmarks.evidence import settings as declared
from benchmarks.evidence.settings import EXPERIMENTS, Sizes
from benchmarks.evidence.units import Settings, units_of
from nullspace.reporting import study as records


def begin(settings: Settings, out: Path) -> None:
    """The first line, or a check that the one that is there says the same."""
    out.mkdir(parents=True, exist_ok=True)
    lines = preservation.Lines(out / records.RESULTS)
    lines.mend()
    mine = {
        "model": Path(settings.model).name if Path(settings.model).exists() else settings.model,
        "dtype": settings.dtype,
        "device": settings.device,
        "triviaqa": settings.triviaqa,
        "sizes": asdict(settings.sizes),
        "level": declared.LEVEL,
    }
    there = lines.read()
    if not there:
        lines.write({"kind": "study", "settings": mine, "environment": environment()})
    elif there[0]["settings"] != mine:
        raise SystemExit(f"{lines.path} is of other settings: {there[0]['settings']}, now {mine}. Choose another --out.")


def compare(path: Path, other: Path) -> None:
    """Say whether the records that two studies share have the same numbers, to the last bit; times are not looked at."""
    left, right = (
        {
            str((r["kind"], r.get("task"), r.get("run"), r.get("post"), r.get("t"), r.get("split"))): {
                name: value for name, value in r.items() if name not in ("seconds", "commit")
            }
            for r in records.read_records(file / records.RESULTS if file.is_dir() else file)
            if r["kind"] != "study"
        }
        for file in (path, other)
    )
    shared = [name for name in left if name in right]
    differing = [name for name in shared if left[name] != right[name]]
    print(
        f"{len(shared)} records are in both: " + (f"{len(differing)} differ, {differing[0]}" if differing else "the same numbers")
    )
    sys.exit(1 if differing or not shared else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("evidence"))
    parser.add_argument("--data", type=Path, help="folder of files; the hub's data sets are read where it has none")
    parser.add_argument("--model", help="hub name or folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--triviaqa", metavar="SOURCE", help="ask TriviaQA too: a file, or a hub data set")
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=["main"])
    parser.add_argument("--methods", nargs="+", choices=methods.EVERY)
    parser.add_argument("--tasks", nargs="+", choices=declared.TASKS, help="in the place of the experiments' own")
    parser.add_argument("--steps", nargs="+", type=int, help="in the place of the experiments' own")
    parser.add_argument("--ranks", nargs="+", type=int, help="in the place of the experiments' own")
    parser.add_argument(
        "--forms", nargs="+", choices=declared.FORMS, help="of the calibration, in the place of the experiments' own"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--compare", type=Path, help="say whether the records of another study have the same numbers, and stop")
    for field in fields(Sizes):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=int, default=field.default, help=f"{field.default} by default"
        )
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> Settings:
    model = options.model
    if model is None:
        from benchmarks.peers import checkpoint_of_demo_model

        model = checkpoint_of_demo_model(Path(".venv") / "smollm2-135m")
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in fields(Sizes)})
    return Settings(str(model), options.data, options.dtype, options.device, options.triviaqa, sizes)


def main() -> None:
    options = parse()
    if options.compare:
        compare(options.out, options.compare)
    settings = settings_of(options)
    begin(settings, options.out)
    given = {name: tuple(getattr(options, name)) for name in ("tasks", "steps", "ranks", "forms") if getattr(options, name)}
    units = [
        unit
        for name in options.experiments
        for unit in units_of(name, EXPERIMENTS[name]._replace(**given), settings.sizes, tuple(options.seeds), options.methods)
    ]
    began = time.perf_counter()
    base.prepare(settings, options.out, units)
    print(f"calibration and base: {time.perf_counter() - began:.0f} s", flush=True)
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, runs.start_worker, (settings, options.out, threads)) as pool:
        failed = [failure for failure in pool.map(runs.work, units) if failure]
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes; {options.out / records.RESULTS}")
    if failed:
        raise SystemExit("\n".join([*failed, f"{len(failed)} of {len(units)} units failed; the same command tries them again"]))


if __name__ == "__main__":
    main()
