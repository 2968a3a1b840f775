"""The command line: `nullspace init | compute | covariances | merge | inspect | report | export | plan | demo`.

What a person reads goes to standard output as tables, or with `--json` as one JSON document; progress and warnings go to standard
error. Exit codes: 0 done, 1 the machine failed (disk, memory) or nullspace did, 2 the input was wrong, 130 interrupted, 143 ended
by SIGTERM. An error is one line; `--debug`, of every command, shows its traceback too.

Under `torchrun`, `init`, `compute` and `covariances` calibrate together; the first process prints and writes what is one thing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import inspect as inspection
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise SystemExit(f"the command line needs more packages: pip install 'nullspace-lora[cli]' ({error})") from None

from nullspace import tables
from nullspace.artifacts import checkpoint, records, store
from nullspace.artifacts.shard_account import parse_shard, what_is_missing
from nullspace.cli import console, failures, options
from nullspace.cli.console import Bars, stderr, stdout
from nullspace.cli.interrupts import Ended, signals_as_exceptions
from nullspace.cli.options import parse_adapters, parse_exclude, parse_targets, parse_weights

if TYPE_CHECKING:
    from nullspace.artifacts.covariances import Covariances
    from nullspace.artifacts.spaces import NullSpaces
    from nullspace.model.sites import Targets

app = typer.Typer(
    name="nullspace",
    help="LoRA adapters in the null space of a model's activations: fine-tuning that forgets less.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
MINUTES = 30.0  # that one process waits for the others: of an eigenproblem that only one of them has, for instance
_documents: list[str] = []  # what `--json` is to print
_reservations = contextlib.ExitStack()  # what the command holds until it ends
_kept: list[Path] = []  # the checkpoint of the calibration that is under way

Model = Annotated[str, typer.Argument(help="Hub name, folder, or .gguf file.")]
Data = Annotated[
    str | None,
    typer.Option(help="What must not be forgotten: a text, JSON Lines, JSON, CSV or Parquet file, or a hub data set."),
]
Field = Annotated[str | None, typer.Option(help="Field(s) that hold the text, joined if several: 'question,answer'.")]
Split = Annotated[str, typer.Option(help="Split of a hub data set.")]
Samples = Annotated[int, typer.Option(help="Sequences to calibrate on.")]
Length = Annotated[int, typer.Option(help="Tokens a sequence.")]
BatchSize = Annotated[int, typer.Option(help="Sequences a batch.")]
Rank = Annotated[int, typer.Option(help="Directions a layer: the adapter's rank.")]
TargetNames = Annotated[
    str, typer.Option(help="'all-linear', name endings ('q_proj,v_proj'), or a regular expression ('re:.*_proj').")
]
Exclude = Annotated[str | None, typer.Option(help="Layers to take away from --targets, in the same form.")]
Precision = Annotated[
    str,
    typer.Option(help="'auto', 'mixed' for float32 chains throughout, 'fp64' for float64 products, 'qr' for no products (slow)."),
]
DType = Annotated[str, typer.Option(help="Of the model's weights: auto, float32, bfloat16, float16.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu, …; CUDA if there is one by default.")]
Offload = Annotated[bool, typer.Option("--offload", help="Leave the weights on the disk and read them block by block.")]
Spectrum = Annotated[bool, typer.Option("--spectrum", help="Report effective ranks too.")]
Strategy = Annotated[
    str, typer.Option(help="'resident': all layers' sums at once; 'layerwise': block by block; 'auto': what the memory asks for.")
]
HiddenStates = Annotated[
    str, typer.Option(help="Where a layerwise run keeps what lies between two blocks: device, host, disk, or auto.")
]
CovariancesIn = Annotated[
    Path | None, typer.Option("--covariances", help="Use what `nullspace covariances` or `merge` wrote instead of --data.")
]
Partial = Annotated[bool, typer.Option("--partial", help="Take covariances though shards of their data are missing.")]
Avoid = Annotated[
    list[Path] | None, typer.Option(help="Directory of an earlier adapter whose A the new ones are not to read; may be repeated.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever an interrupted run left in OUT.checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result of ours.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output instead of tables.")]
Timeout = Annotated[float, typer.Option(min=0.05, help="Under torchrun: minutes that one process waits for the others.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no tables.")]
Debug = Annotated[bool, typer.Option("--debug", help=f"Show the traceback of an error; {failures.DEBUG}=1 does the same.")]


def main() -> None:
    """Entry point of the `nullspace` command."""
    app()


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"nullspace {_versions()['nullspace-lora']}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    debug: Debug = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    context.obj = debug


def _exits(command: Callable[..., None]) -> Callable[..., None]:
    """Check the options, run the command, and turn errors into one line on standard error and an exit code.

    Under `torchrun`, join the other processes, and leave the printing to the first. Every command also gets `--debug`.
    """

    @functools.wraps(command)
    def wrapped(context: typer.Context, debug: bool, **values: Any) -> None:
        stdout.quiet = stderr.quiet = _is_one_of_several() and not _is_rank_zero()
        reported = functools.partial(_reported, failures.debugging(debug or bool(context.obj)), bool(values.get("fresh")))
        with console.captured(), signals_as_exceptions():
            with reported():
                options.check(command.__name__, values, [name for name in values if _was_given(context, name)])
            with _joined(command.__name__, values.get("timeout", MINUTES)) as takes_part, reported():
                if not takes_part:
                    return
                _documents.clear()
                _kept.clear()
                # Whatever other libraries print (DeepSpeed's log, on import) is no part of the document.
                elsewhere = contextlib.redirect_stdout(sys.stderr) if values.get("as_json") else contextlib.nullcontext()
                with elsewhere, _reservations:
                    command(**values)
                while _documents:
                    typer.echo(_documents.pop(0))

    known = inspection.signature(command, eval_str=True)
    kind = inspection.Parameter.KEYWORD_ONLY
    added = [
        inspection.Parameter("context", kind, annotation=typer.Context),
        inspection.Parameter("debug", kind, annotation=Debug, default=False),
    ]
    own = [parameter.replace(kind=kind) for parameter in known.parameters.values()]
    wrapped.__signature__ = known.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *added]}
    return wrapped


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and not source.name.startswith("DEFAULT")


@contextlib.contextmanager
def _reported(debug: bool, fresh: bool) -> Iterator[None]:
    """Turn what is raised inside into a line and an exit code; with `debug`, print the traceback first."""
    try:
        yield
    except (KeyboardInterrupt, Ended) as ended:
        how, code = (f"ended by {ended.name}", ended.exit_code) if isinstance(ended, Ended) else ("interrupted", 130)
        stderr.print(how + _what_is_kept(fresh), soft_wrap=True)
        raise typer.Exit(code) from None
    except typer.Exit:
        raise
    except Exception as error:
        if debug:
            traceback.print_exception(error, file=sys.stderr)
        verdict = failures.judge(error)
        _say(error, verdict)
        raise typer.Exit(verdict.exit_code) from None


def _what_is_kept(fresh: bool) -> str:
    """What the message of an interruption says of the checkpoint; nothing if this command has none."""
    sites = sum(checkpoint.sites_in(directory) for directory in _kept)
    if not sites:
        return ""
    command = "the same command without --fresh" if fresh else "the same command"
    return f"; {_kept[0]} has {sites} finished sites, and {command} goes on behind them"


TOGETHER = ("init", "compute", "covariances")
LINGERING, ENDING = 18, 8  # seconds; torchrun kills after 30


@contextlib.contextmanager
def _joined(command: str, minutes: float) -> Iterator[bool]:
    """Whether this process has a part in the command; inside, it is in the group that `torchrun` has started, if it has."""
    if not _is_one_of_several():
        yield True
        return
    if command not in TOGETHER:
        yield _is_rank_zero()
        return
    import torch
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_RANK", "0"))
    own_gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > local
    if own_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if own_gpu else "gloo", timeout=datetime.timedelta(minutes=minutes))
    before = signal.signal(signal.SIGTERM, _linger)
    try:
        yield True
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def _linger(*_: Any) -> None:
    """`torchrun` ends everybody as soon as one is lost: stay long enough to say who, and where that was."""

    def end(*_: Any) -> None:
        signal.signal(signal.SIGALRM, die)  # if what it waits for then does not end
        signal.alarm(ENDING)
        raise Ended(signal.SIGTERM)

    def die(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, end)
    signal.alarm(LINGERING)


def _is_one_of_several() -> bool:
    """Whether `torchrun` has started this process, and others with it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


def _is_rank_zero() -> bool:
    return int(os.environ["RANK"]) == 0


def _is_first() -> bool:
    """Whether this process prints, and writes what one process alone has to write."""
    return not stdout.quiet


def _is_everyones(error: BaseException) -> bool:
    """Whether all processes have this error."""
    if "torch" not in sys.modules:
        return False
    from nullspace.distributed.errors import was_shared

    return was_shared(error)


def _say(error: BaseException, verdict: failures.Verdict) -> None:
    """Print an error; of several processes that have it, the first one does."""
    if not _is_first():
        time.sleep(2)  # by then the first one has printed its own, if it has any, and whoever exits first ends the others
        if _is_everyones(error) and not getattr(error, "reports", False):
            return
        stderr.quiet = False
    console.say(verdict.word, verdict.text, "bold red")


@app.command()
@_exits
def init(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for adapter/, base/ and spaces/; must not exist yet.")],
    data: Data = None,
    spaces: Annotated[Path | None, typer.Option(help="Use these null spaces (of `nullspace compute`) instead of --data.")] = None,
    covariances: CovariancesIn = None,
    partial: Partial = False,
    field: Field = None,
    split: Split = "train",
    samples: Samples = 256,
    length: Length = 1024,
    batch_size: BatchSize = 4,
    rank: Rank = 128,
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha; the rank by default, so that the scaling is 1.")] = None,
    use_rslora: Annotated[bool, typer.Option("--use-rslora", help="Scale by alpha / sqrt(rank).")] = False,
    method: Annotated[
        str,
        typer.Option(
            help="'lora-null', 'corda-kpm', 'corda-ipm', 'corda-exact', 'sc-lora', 'milora' or 'pissa'; 'b-zero', 'eva' or "
            "'orthogonal' leave the base alone."
        ),
    ] = "lora-null",
    sigma_scale: Annotated[float, typer.Option(help="lora-null: multiply the adapter's product (the paper's Table 5).")] = 1.0,
    preserve: Annotated[
        Path | None, typer.Option(help="sc-lora: covariances of what must not be forgotten; --data is then the task.")
    ] = None,
    beta: Annotated[float, typer.Option(help="sc-lora: 0 for the task alone, 1 for preservation alone.")] = 0.5,
    damping: Annotated[float, typer.Option(help="corda: added to the diagonal of C, relative to its mean.")] = 0.01,
    avoid: Avoid = None,
    targets: TargetNames = "all-linear",
    exclude: Exclude = None,
    precision: Precision = "auto",
    dtype: DType = "auto",
    device: Device = None,
    offload: Offload = False,
    strategy: Strategy = "auto",
    hidden_states: HiddenStates = "auto",
    fresh: Fresh = False,
    timeout: Timeout = MINUTES,
    spectrum: Spectrum = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """From a model and a text to a LoRA adapter in the text's null space (or of another method), and its residual base."""
    from peft import LoraConfig

    from nullspace import Covariances, NullSpaces
    from nullspace.integrations import peft
    from nullspace.methods import METHODS

    began = time.perf_counter()
    needs = METHODS[method].needs
    sources = [("--data", data), ("--spaces", spaces), ("--covariances", covariances)]
    given = [name for name, value in sources if value is not None]
    if not needs and given:
        raise ValueError(f"method {method!r} looks at the weights alone: leave out {given[0]}")
    if needs and (len(given) != 1 or (spaces is not None and "spaces" not in needs)):
        raise ValueError("give one of --data, --covariances" + (" and --spaces" if "spaces" in needs else f" for {method!r}"))
    if preserve is None and "preserve" in needs:
        raise ValueError(f"{method!r} needs --preserve")
    if data is None and not _is_first():
        return
    _reserve(out, overwrite, calibrates=data is not None)
    avoided = _row_spaces(avoid)
    kept = None if covariances is None else Covariances.load(covariances, partial=partial)
    preserved = None if preserve is None else Covariances.load(preserve, partial=partial)
    found = None if spaces is None else NullSpaces.load(spaces)
    with _bars(quiet) as progress:
        longest = None if data is None else length
        loaded, tokenizer, chosen = _open_model(model, dtype, device, offload, targets, exclude, rank, longest, progress)
        for known in (each for each in (found, kept, preserved) if each is not None):
            for name in [name for name in chosen if name not in known]:
                chosen.leave_out(name, "is none of the layers of --spaces, --covariances or --preserve")
        task = "CAUSAL_LM" if type(loaded).__name__.endswith("ForCausalLM") else None
        peft.fit_config(LoraConfig(r=rank, target_modules=list(chosen), task_type=task), loaded, chosen)
        peft.check_servable(loaded, chosen, method, offloaded=True)
        if data is not None:
            batches = _open_data(data, tokenizer, field, split, samples, length, batch_size, progress)
            run = _Run(chosen, strategy, hidden_states, precision)
            if "spaces" in needs:
                found = _compute(loaded, batches, run, rank, spectrum, avoided, out, fresh, progress)
            else:
                kept = _accumulate(loaded, batches, run, "float64", None, out, fresh, True, progress)
            if not _is_first():
                return
        elif "spaces" in needs and found is None:
            assert kept is not None
            found = NullSpaces.from_covariances(kept, rank=rank, spectrum=spectrum, avoid=avoided, progress=progress)
        if data is None:
            chosen.settle(loaded)
        scale: Any = rank if alpha is None else int(alpha) if alpha.is_integer() else alpha  # PEFT declares int, takes any number
        config = LoraConfig(
            r=rank,
            lora_alpha=scale,
            use_rslora=use_rslora,
            target_modules=list(chosen),
            task_type=task,
        )
        numbers: dict[str, Any] = {"sigma_scale": sigma_scale, "beta": beta, "damping": damping}
        record = {
            "data": data or (str(covariances) if covariances else None),
            "rank": rank,
            "alpha": config.lora_alpha,
            "use_rslora": use_rslora,
            "method": method,
            **{option: value for option, value in numbers.items() if option in METHODS[method].options},
            "versions": _versions(),
        }
        peft.write_init(
            out,
            loaded,
            config,
            found,
            method=method,
            covariances=None if "spaces" in needs else kept,
            preserve=preserved,
            **numbers,
            tokenizer=tokenizer,
            record={**record, "model": model},
            overwrite=overwrite,
            progress=progress,
        )
    facts = {"out": str(out), **record, "model": model, "seconds": time.perf_counter() - began}
    if found is not None:
        _show(found, as_json, quiet, facts)
    elif as_json:
        _print_json({**facts, "layers": len(chosen)})
    if not (as_json or quiet):
        stdout.print(_next_steps(out, model, residual=METHODS[method].changes_base), highlight=False, soft_wrap=True, markup=False)
    if data is not None:  # until now, several processes' null spaces were read from there
        checkpoint.delete(_checkpoint_of(out))


@app.command()
@_exits
def compute(
    out: Annotated[Path, typer.Option(help="Directory for the null spaces; must not exist yet.")],
    model: Annotated[str | None, typer.Argument(help="Hub name, folder, or .gguf file; none with --covariances.")] = None,
    data: Data = None,
    covariances: CovariancesIn = None,
    partial: Partial = False,
    field: Field = None,
    split: Split = "train",
    samples: Samples = 256,
    length: Length = 1024,
    batch_size: BatchSize = 4,
    rank: Rank = 128,
    avoid: Avoid = None,
    targets: TargetNames = "all-linear",
    exclude: Exclude = None,
    precision: Precision = "auto",
    dtype: DType = "auto",
    device: Device = None,
    offload: Offload = False,
    strategy: Strategy = "auto",
    hidden_states: HiddenStates = "auto",
    fresh: Fresh = False,
    timeout: Timeout = MINUTES,
    spectrum: Spectrum = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Only the null spaces: for `nullspace init --spaces`, or `NullSpaces.load`."""
    from nullspace import Covariances, NullSpaces

    began = time.perf_counter()
    if covariances is None and (model is None or data is None):
        raise ValueError("give MODEL and --data, or --covariances")
    if covariances is not None and (model is not None or data is not None):
        raise ValueError("--covariances needs neither MODEL nor --data: leave them out")
    if data is None and not _is_first():
        return
    _reserve(out, overwrite, calibrates=covariances is None)
    avoided = _row_spaces(avoid)
    with _bars(quiet) as progress:
        if covariances is not None:
            kept = Covariances.load(covariances, partial=partial)
            found = NullSpaces.from_covariances(kept, rank=rank, spectrum=spectrum, avoid=avoided, progress=progress)
        else:
            assert model is not None
            loaded, tokenizer, chosen = _open_model(model, dtype, device, offload, targets, exclude, rank, length, progress)
            batches = _open_data(data, tokenizer, field, split, samples, length, batch_size, progress)
            run = _Run(chosen, strategy, hidden_states, precision)
            found = _compute(loaded, batches, run, rank, spectrum, avoided, out, fresh, progress)
    if not _is_first():
        return
    found.save(out, overwrite=overwrite)
    source = str(covariances) if covariances is not None else data
    _show(found, as_json, quiet, {"out": str(out), "model": model, "data": source, "seconds": time.perf_counter() - began})
    if covariances is None:
        checkpoint.delete(_checkpoint_of(out))


@app.command()
@_exits
def covariances(
    model: Model,
    data: Annotated[str, typer.Option(help="A file or a hub data set.")],
    out: Annotated[Path, typer.Option(help="Directory for the second moments; must not exist yet.")],
    field: Field = None,
    split: Split = "train",
    samples: Samples = 256,
    length: Length = 1024,
    batch_size: BatchSize = 4,
    targets: TargetNames = "all-linear",
    exclude: Exclude = None,
    precision: Precision = "fp64",
    keep: Annotated[str, typer.Option(help="float64, or float32 for half the space and 7 digits.")] = "float64",
    shard: Annotated[
        str | None,
        typer.Option(help="'i/n': every n-th batch from the i-th on, for `nullspace merge` with the others, 1/n to n/n."),
    ] = None,
    dtype: DType = "auto",
    device: Device = None,
    offload: Offload = False,
    strategy: Strategy = "auto",
    hidden_states: HiddenStates = "auto",
    fresh: Fresh = False,
    timeout: Timeout = MINUTES,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Keep the second moments themselves, for any method and rank later, or to be merged with those of other data."""
    began = time.perf_counter()
    _reserve(out, overwrite, calibrates=True)
    part = None if shard is None else parse_shard(shard)
    with _bars(quiet) as progress:
        loaded, tokenizer, chosen = _open_model(model, dtype, device, offload, targets, exclude, None, length, progress)
        batches = _open_data(data, tokenizer, field, split, samples, length, batch_size, progress)
        run = _Run(chosen, strategy, hidden_states, precision)
        found = _accumulate(loaded, batches, run, keep, out, out, fresh, overwrite, progress, shard=part)
    if not _is_first():
        return
    checkpoint.delete(_checkpoint_of(out))
    facts = {"out": str(out), "model": model, "data": data, "seconds": time.perf_counter() - began}
    _show_covariances(found, as_json, quiet, facts)


@app.command()
@_exits
def merge(
    runs: Annotated[list[Path], typer.Argument(help="What `nullspace covariances` wrote, of one model.")],
    out: Annotated[Path, typer.Option(help="Directory for the sums; must not exist yet.")],
    weights: Annotated[str | None, typer.Option(help="A factor a run: '2,1'; 1 by default.")] = None,
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Divide each run by its trace first: several tasks that are to count alike.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Shards may be missing: a merge on the way, to be merged with others.")
    ] = False,
    keep: Annotated[str, typer.Option(help="float64, or float32 for half the space and 7 digits.")] = "float64",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Add second moments: the shards of one data set, more data later, several corpora or tasks."""
    import torch

    from nullspace import Covariances

    _reserve(out, overwrite)
    factors = None if weights is None else parse_weights(weights)
    loaded = [Covariances.load(run, partial=True) for run in runs]
    found = Covariances.merge(loaded, weights=factors, normalise=normalise, partial=partial)
    found.save(out, overwrite=overwrite, dtype=getattr(torch, keep))
    facts = {"out": str(out), "runs": [str(run) for run in runs], "weights": factors, "normalise": normalise}
    _show_covariances(Covariances.load(out, partial=True), as_json, quiet, facts)


@app.command()
@_exits
def inspect(
    directory: Annotated[
        Path,
        typer.Argument(
            help="What `nullspace compute`, `init`, `export`, `covariances` or `merge` wrote, or a folder in it; an adapter in "
            "or after training; a model."
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(help="Write into the adapter's configuration and card that its base is this folder or hub name, now."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show null spaces (leak, gap, tokens and outliers of every site), covariances, or which base an adapter needs."""
    from nullspace import Covariances, NullSpaces

    if base is not None:
        from nullspace.integrations.peft import set_base

        set_base(directory, base)
    kind = records.kind_of(directory)
    if kind == "covariances":
        _show_covariances(Covariances.load(directory, partial=True), as_json, False, {"directory": str(directory)})
        return
    if kind == "spaces":
        _show(NullSpaces.load(directory), as_json, False, {"directory": str(directory)})
        return
    from nullspace.integrations.peft import describe

    facts = describe(directory)
    if not as_json:
        _show_facts(facts)
    if (directory / "spaces").is_dir():
        _show(NullSpaces.load(directory / "spaces"), as_json, False, facts)
    elif as_json:
        _print_json(facts)


@app.command()
@_exits
def report(
    out: Annotated[Path, typer.Option(help="The HTML file; must not exist yet.")],
    covariances: Annotated[Path | None, typer.Option(help="What `nullspace covariances` or `merge` wrote.")] = None,
    spaces: Annotated[Path | None, typer.Option(help="What `nullspace compute` or `init` wrote.")] = None,
    model: Annotated[str | None, typer.Option(help="The untouched base model: hub name, folder, or .gguf file.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=INITIAL[,TRAINED…]: what `nullspace init` wrote, or an adapter's directory, and those of it in training "
            "(a folder of Trainer's checkpoints stands for all of them); may be repeated."
        ),
    ] = None,
    study: Annotated[Path | None, typer.Option(help="A preservation study: its directory, or the results.jsonl in it.")] = None,
    offload: Offload = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier page of ours.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers as one JSON document on standard output.")] = False,
    quiet: Quiet = False,
) -> None:
    """One HTML file: effective ranks, spectra, leaks, and what training did to adapters, layer by layer."""
    try:
        from nullspace.reporting import page as pages
    except ImportError as error:
        raise ValueError(str(error)) from None
    from nullspace import Covariances, NullSpaces, analysis
    from nullspace.integrations.peft import read_course
    from nullspace.model.linear import is_linear
    from nullspace.reporting import study as fronts

    began = time.perf_counter()
    layers = covariances is not None or spaces is not None or bool(adapter)
    if not layers and study is None:
        raise ValueError("give at least one of --covariances, --spaces, --adapter and --study")
    _reservations.enter_context(store.reserved(out, pages.is_page, overwrite=overwrite))
    studied = None if study is None else fronts.read_study(study / fronts.RESULTS if study.is_dir() else study)
    parts = [] if studied is None else pages.study_sections(studied)
    named = parse_adapters(adapter or [])
    courses = [read_course(name, *directories) for name, directories in named.items()]
    kept = None if covariances is None else Covariances.load(covariances)
    if spaces is None:  # of the first adapter that has its own beside it
        spaces = next((inits[0] / "spaces" for inits in named.values() if (inits[0] / "spaces").is_dir()), None)
    elif (spaces / "spaces").is_dir():
        spaces = spaces / "spaces"
    found = None if spaces is None else NullSpaces.load(spaces)
    with _bars(quiet) as progress:
        modules = None
        if model is not None:
            loaded = _load(model, "auto", "cpu", offload, progress)[0]
            modules = {name: module for name, module in loaded.named_modules() if is_linear(module)}
        told = analysis.analyse(kept, found, modules=modules, courses=courses, progress=progress)
    sources = {
        "model": model,
        "covariances": covariances and str(covariances),
        "spaces": spaces and str(spaces),
        "study": study and str(study),
        "adapters": {name: [str(directory) for directory in directories] for name, directories in named.items()},
    }
    parts += pages.sections(told) if layers else []
    pages.write(out, "What the layers hear", _sources_line(sources), parts, overwrite=overwrite)
    facts: dict[str, Any] = {"out": str(out), **sources, "seconds": time.perf_counter() - began}
    if studied is not None:
        facts["equal_loss"] = {measure: fronts.as_json(fronts.at_equal_loss(studied, measure)) for measure in fronts.MEASURES}
        facts["runs"] = fronts.as_json(fronts.over_seeds(studied))
    if as_json:
        ranks, adapters = analysis.rank_summary(told), analysis.adapter_summary(told)
        _print_json({**facts, **told._asdict(), "effective_ranks": ranks, "adapter_summary": adapters})
    elif not quiet:
        shown = sum(bool(part.pictures) for part in parts)
        line = f"{out}: {shown} of {len(parts)} sections, {out.stat().st_size / 1e6:.1f} MB"
        stdout.print(line, soft_wrap=True, highlight=False, markup=False)


@app.command()
@_exits
def export(
    trained: Annotated[Path, typer.Argument(help="Directory of the trained adapter.")],
    initial: Annotated[Path, typer.Option(help="What `nullspace init` wrote, or the adapter directory in it.")],
    out: Annotated[Path, typer.Option(help="Directory for the plain LoRA; must not exist yet.")],
    base: Annotated[str | None, typer.Option(help="Name of the untouched base; by default that which `init` was given.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """A trained adapter as a plain LoRA for the untouched base: rank r where A was frozen, 2r otherwise."""
    from nullspace.integrations.peft import export_lora

    _reserve(out, overwrite)
    export_lora(trained, initial, out, base=base, overwrite=overwrite)
    found = records.read_manifest(out, "export")
    facts = {"base": found["model"], **{name: found[name] for name in ("rank", "alpha", "max_lora_rank", "holds")}}
    if as_json:
        _print_json({"out": str(out), **facts})
    elif not quiet:
        limit = facts["max_lora_rank"]
        server = f"vLLM needs --max-lora-rank {limit}" if limit else "vLLM serves no rank as large as that"
        line = f"{out}: rank {facts['rank']}, alpha {facts['alpha']}, for {facts['base']}; {server}"
        stdout.print(line, soft_wrap=True, highlight=False, markup=False)


@app.command()
@_exits
def plan(
    model: Annotated[str, typer.Argument(help="Hub name, or folder with a config.json. No weights are read.")],
    samples: Samples = 256,
    length: Length = 1024,
    batch_size: BatchSize = 4,
    rank: Rank = 128,
    targets: TargetNames = "all-linear",
    exclude: Exclude = None,
    dtype: DType = "auto",
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; cuda by default if there is one, or if --device-memory is given.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Only plans with the weights on 'device', 'host' or 'disk'.")] = None,
    device_memory: Annotated[str | None, typer.Option(help="Of the GPU: 24GB, 80GiB, …; without, no limit.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="Of the host; without, no limit.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a calibration would take in memory and time, from the model's configuration alone."""
    import torch

    from nullspace.integrations.transformers import empty_model
    from nullspace.model.sites import find_targets
    from nullspace.planning.choice import fit
    from nullspace.planning.forecast import forecast
    from nullspace.planning.plan import Workload, cells, describe
    from nullspace.planning.units import parse_size

    empty = empty_model(model, dtype=dtype)
    _check_length(empty.config, model, length)
    chosen_layers = find_targets(empty, parse_targets(targets), exclude=parse_exclude(exclude), rank=rank)
    chosen_layers.settle(empty)
    limits = tuple(parse_size(text) if text else None for text in (device_memory, host_memory))
    workload = Workload(
        samples=samples,
        length=length,
        batch_size=batch_size,
        rank=rank,
        targets=chosen_layers,
        device=device or ("cuda" if device_memory or torch.cuda.is_available() else "cpu"),
        weights=weights,
    )
    plans = forecast(empty, workload)
    chosen, lack = None, None
    try:
        chosen = fit(empty, workload, device_memory=limits[0], host_memory=limits[1])
    except MemoryError as error:
        lack = str(error)
    if as_json:
        facts = {"model": model, "device_memory": limits[0], "host_memory": limits[1], "plans": [p.as_dict() for p in plans]}
        _print_json({**facts, "choice": chosen.as_dict() if chosen else None, "missing": lack})
        return
    _show_table([cells(p, fits=not p.missing(*limits)) for p in plans])
    stdout.print(
        f"\nThe fastest that fits: {describe(chosen)}" if chosen else f"\n{lack}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    if plans[0].estimated_rates:
        stdout.print("Times rest on estimated throughputs: they rank the plans, and promise nothing.", soft_wrap=True)
    if not plans[0].tracked:
        stdout.print("The model does not run without data: its activations are estimated from its layers.", soft_wrap=True)


@app.command()
@_exits
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the result.")] = Path("nullspace-demo"),
    rank: Rank = 32,
    overwrite: Overwrite = False,
) -> None:
    """The whole walk on a real language model, without a network: SmolLM2-135M, calibrated on Python's own documentation."""
    from nullspace.cli.demo import run

    _reserve(out, overwrite)
    with _bars() as progress:
        run(out, rank=rank, overwrite=overwrite, say=progress.say, progress=progress)


def _sources_line(sources: dict[str, Any]) -> str:
    given = [f"{what} {value}" for what, value in sources.items() if value and what != "adapters"]
    given += [f"adapter {name} ({', '.join(directories)})" for name, directories in sources["adapters"].items()]
    return f"From {'; '.join(given)}."


def _open_model(
    name: str,
    dtype: str,
    device: str | None,
    offload: bool,
    targets: str,
    exclude: str | None,
    rank: int | None,
    length: int | None,
    progress: Callable[..., None],
) -> tuple[Any, Any, Targets]:
    from nullspace.integrations.transformers import read_config
    from nullspace.model.sites import find_targets

    is_gguf = Path(name).suffix == ".gguf"  # whose configuration takes as long to read as its weights
    if length is not None and not is_gguf:
        _check_length(read_config(name), name, length)
    model, tokenizer = _load(name, dtype, device, offload, progress)
    if length is not None and is_gguf:
        _check_length(model.config, name, length)
    return model, tokenizer, find_targets(model, parse_targets(targets), exclude=parse_exclude(exclude), rank=rank)


def _check_length(config: Any, name: str, length: int) -> None:
    from nullspace.integrations.transformers import positions

    limit = positions(config)
    if limit is not None and length > limit:
        raise ValueError(
            f"--length {length} is more than the {limit} positions that {name} has: give at most {limit}, or scale its rotary "
            "embeddings in its config.json if it has any"
        )


def _load(name: str, dtype: str, device: str | None, offload: bool, progress: Callable[..., None]) -> tuple[Any, Any]:
    from nullspace.integrations.transformers import load_model

    progress("model", 0, 1, 0)
    model, tokenizer = load_model(name, dtype=dtype, device=device, offload=offload)
    progress("model", 1, 1, 0)
    return model, tokenizer


def _open_data(
    data: str | None,
    tokenizer: Any,
    field: str | None,
    split: str,
    samples: int,
    length: int,
    batch_size: int,
    progress: Callable[..., None],
) -> Any:
    from nullspace.integrations.transformers import PackedBatches, load_texts

    progress("data", 0, 1, 0)
    texts = load_texts(str(data), field=field, split=split)
    batches = PackedBatches(texts, tokenizer, samples=samples, length=length, batch_size=batch_size)
    progress("data", 1, 1, 0)
    return batches


class _Run(NamedTuple):
    """How the model is run."""

    targets: Targets
    strategy: str
    hidden_states: str
    precision: str


def _checkpoint_of(out: Path) -> Path:
    """Where a run keeps what it has finished, beside what it is going to write."""
    out = Path(os.path.abspath(out))
    return out.with_name(f"{out.name}.checkpoint")


def _reserve(out: Path, overwrite: bool, *, calibrates: bool = False) -> None:
    """Until the command ends, no other run writes to OUT: what is in the way of OUT and of its checkpoint is known before any work.

    Of several processes that calibrate together, the first one holds OUT; what it finds is raised by all.
    """
    from nullspace.distributed import Job

    job = Job() if calibrates else Job.alone()
    with job.sharing_errors():
        if job.first:
            _reservations.enter_context(store.reserved(out, overwrite=overwrite))
            if calibrates:
                checkpoint.check_place(_checkpoint_of(out))
    job.exchange(None)


def _begin_checkpoint(out: Path, fresh: bool) -> Path:
    """The checkpoint for the calibration that begins now, without what an earlier run has kept if it is to be fresh."""
    directory = _checkpoint_of(out)
    if fresh and _is_first():
        checkpoint.delete(directory)
    _kept.append(directory)
    return directory


def _row_spaces(adapters: list[Path] | None) -> dict[str, Any] | None:
    if not adapters:
        return None
    from nullspace.integrations.peft import row_spaces

    return row_spaces(*adapters)


def _compute(
    model: Any,
    batches: Any,
    run: _Run,
    rank: int,
    spectrum: bool,
    avoid: dict[str, Any] | None,
    out: Path,
    fresh: bool,
    progress: Callable[..., None],
) -> NullSpaces:
    from nullspace import compute_null_spaces

    kept = _begin_checkpoint(out, fresh)
    if avoid is not None:  # an earlier adapter may have been on more layers
        avoid = {name: rows for name, rows in avoid.items() if name in run.targets}
    return compute_null_spaces(
        model, batches, **run._asdict(), rank=rank, spectrum=spectrum, avoid=avoid, checkpoint=kept, progress=progress
    )


def _accumulate(
    model: Any,
    batches: Any,
    run: _Run,
    keep: str,
    into: Path | None,
    out: Path,
    fresh: bool,
    overwrite: bool,
    progress: Callable[..., None],
    *,
    shard: tuple[int, int] | None = None,
) -> Covariances:
    import torch

    from nullspace import compute_covariances

    kept = _begin_checkpoint(out, fresh)
    return compute_covariances(
        model,
        batches,
        into or kept / checkpoint.COVARIANCES,
        **run._asdict(),
        dtype=getattr(torch, keep),
        shard=shard,
        checkpoint=kept,
        overwrite=overwrite,
        progress=progress,
    )


def _show_covariances(covariances: Covariances, as_json: bool, quiet: bool, facts: dict[str, Any]) -> None:
    rows = covariances.rows()
    missing = what_is_missing(covariances.shards)
    if as_json:
        _print_json({**facts, "shards": [part.as_json() for part in covariances.shards], "sites": rows})
    elif not quiet:
        _show_table([tables.covariance_cells(row) for row in rows])
        if missing:
            stdout.print(f"\nThe sums of a part of the data: {missing} missing.", soft_wrap=True, highlight=False, markup=False)


def _show(spaces: NullSpaces, as_json: bool, quiet: bool, facts: dict[str, Any]) -> None:
    rows = spaces.rows()
    if as_json:
        _print_json({**facts, "sites": rows})
    elif not quiet:
        _show_table([tables.cells(row) for row in rows])


def _show_facts(facts: dict[str, Any]) -> None:
    """What is known of a folder, a line a fact, and sentences on what to do with it."""
    leak = facts.get("leak")
    shown = {**facts, "leak": leak and f"{leak['median']:.2e} (median), {leak['worst']:.2e} (worst, {leak['worst_site']})"}
    for name, value in shown.items():
        if name not in ("notes", "holds") and value not in (None, False):
            stdout.print(
                f"{name.replace('_', ' '):12} {' '.join(str(value).split())}", markup=False, highlight=False, soft_wrap=True
            )
    for note in facts["notes"]:
        stdout.print(f"\n{note}", markup=False, highlight=False, soft_wrap=True)
    stdout.print()


def _show_table(shown: list[dict[str, str]]) -> None:
    table = Table(box=None, pad_edge=False)
    for index, title in enumerate(shown[0]):
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in shown:
        table.add_row(*map(Text, row.values()))  # not as markup: names come from files
    # Numbers are never cut: in a window that is too narrow, the lines wrap.
    needed = stdout.measure(table, options=stdout.options.update(width=1000)).maximum
    Console(width=max(needed, stdout.width)).print(table)


def _next_steps(out: Path, model: str, *, residual: bool) -> str:
    base = out / "base" if residual else model
    return (
        f"\nWrote {out}. To train it:\n\n"
        f"    base = AutoModelForCausalLM.from_pretrained({str(base)!r})\n"
        f"    model = PeftModel.from_pretrained(base, {str(out / 'adapter')!r}, is_trainable=True)\n\n"
        f"and afterwards, for the untouched base: nullspace export TRAINED --initial {out} --out EXPORTED"
    )


def _print_json(value: dict[str, Any]) -> None:
    """Once the command is through."""
    _documents.append(json.dumps(value, indent=1, ensure_ascii=False))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("nullspace-lora", "torch", "transformers", "peft", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _bars(quiet: bool = False) -> Bars:
    return Bars(quiet or not _is_first())
