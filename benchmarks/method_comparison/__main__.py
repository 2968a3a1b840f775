"""Our methods in PEFT's method comparison (MetaMathQA, GSM8K): write experiments, run one, show results.

python -m benchmarks.method_comparison write --out OUT [--methods contrast filter] [--keep Salesforce/wikitext:wikitext-103-raw-v1]
python -m benchmarks.method_comparison run --peft CHECKOUT OUT/experiments/contrast/llama-3.2-3B-rank32-lr_0.0001
python -m benchmarks.method_comparison show OUT --peft CHECKOUT
python -m benchmarks.method_comparison run --peft CHECKOUT EXPERIMENT --dry-run --data FOLDER --model FOLDER   # on a CPU
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.method_comparison import results
from benchmarks.method_comparison.checkout import FOLDER, Checkout, name_of, train, use_peft_of
from benchmarks.method_comparison.experiments import FINEWIKI, RECIPES, Sizes, Start, write
from nullspace.errors import NullspaceError


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    new = commands.add_parser("write", help="write experiment folders")
    new.add_argument("--out", type=Path, required=True)
    new.add_argument("--model", default=Sizes.model, help="hub name or folder (default: %(default)s)")
    new.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES))
    new.add_argument("--rank", type=int, default=Sizes.rank)
    new.add_argument("--targets", nargs="+", default=list(Sizes.targets), help="layers (default: those of PEFT's LoRA)")
    new.add_argument("--rates", nargs="+", type=float, help="learning rates (default: 1e-4, where A is frozen 2e-4 too)")
    new.add_argument("--seeds", nargs="+", type=int, default=[0])
    new.add_argument(
        "--keep", default=FINEWIKI, help="what must be kept: finewiki (rows that forgetting is not measured on), or data"
    )

    run = commands.add_parser("run", help="run one experiment by PEFT's run.py")
    run.add_argument("experiment", type=Path)
    run.add_argument("--peft", type=Path, required=True, metavar="CHECKOUT")
    run.add_argument("--out", type=Path, help="folder of the results (default: beside experiments/)")
    run.add_argument("--dry-run", action="store_true", help="three steps of a small model on a CPU, with local data")
    run.add_argument("--data", type=Path, help="of a dry run: folder with gsm8k_train.jsonl, gsm8k_test.jsonl, humaneval.jsonl")
    run.add_argument("--model", help="of a dry run: folder of a small model")

    shown = commands.add_parser("show", help="read result files")
    shown.add_argument("out", type=Path)
    shown.add_argument("--peft", type=Path, metavar="CHECKOUT", help="show its published results too")
    return parser


def run_one(theirs: Checkout, experiment: Path, out: Path) -> list[Path]:
    """Run an experiment of any method; the result files."""
    from benchmarks.method_comparison.filtering import run_filter
    from benchmarks.method_comparison.start import Starter

    start = Start.load(experiment)
    if start is not None and start.method == "filter":
        return run_filter(theirs, experiment, start, out)
    return [train(theirs, experiment, out, None if start is None else Starter(theirs, start))]


def run(options: argparse.Namespace) -> None:
    experiment = options.experiment.resolve()
    name_of(experiment)
    out = (options.out or experiment.parents[2]).resolve()
    use_peft_of(options.peft)  # before anything imports another one
    if not options.dry_run:
        written = run_one(Checkout.load(options.peft), experiment, out)
    else:
        os.environ["HF_HUB_OFFLINE"] = "1"
        from benchmarks.method_comparison import dry_run

        small = dry_run.shrunk(experiment, out / "dry-run", options.model)
        start = Start.load(small)
        with dry_run.on_cpu(options.peft, options.data, start.skip if start else Start.skip) as theirs:
            written = run_one(theirs, small, out / "dry-run")
        print(dry_run.NOT_EXERCISED)
    print("\n".join(f"wrote {path}" for path in written))


def main(argv: list[str] | None = None) -> None:
    parser = parser_of()
    options = parser.parse_args(argv)
    if options.command == "run" and options.dry_run and not (options.data and options.model):
        parser.error("--dry-run needs --data and --model")
    try:
        command(options)
    except NullspaceError as error:
        raise SystemExit(f"error: {error}") from error


def command(options: argparse.Namespace) -> None:
    if options.command == "write":
        sizes = Sizes(options.model, options.rank, tuple(options.targets), options.keep)
        for folder in write(options.out, sizes, options.methods, options.rates, options.seeds):
            print(folder)
    elif options.command == "run":
        run(options)
    else:
        print(results.show(options.out, options.peft and options.peft / FOLDER / "results"))


if __name__ == "__main__":
    main()
