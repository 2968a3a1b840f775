"""`nullspace report`: one HTML page of what earlier commands and trainings left."""

from __future__ import annotations

import datetime
import platform
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nullspace.cli import console
from nullspace.cli.calibrate import load_model
from nullspace.cli.options import JSON, OFFLOAD, OVERWRITE, QUIET, Loading, Values, needed, option, parsed
from nullspace.errors import InputError

if TYPE_CHECKING:
    from nullspace.analysis import Analysis, Row
    from nullspace.progress import Progress
    from nullspace.reporting.page import Section
    from nullspace.reporting.verdict import Finding


def _parse_adapters(texts: list[str]) -> dict[str, list[Path]]:
    """The `--adapter` options: name → directories, the initial one first."""
    adapters: dict[str, list[Path]] = {}
    for text in texts:
        name, _, paths = text.partition("=")
        directories = [part.strip() for part in paths.split(",")]
        if not name.strip() or not all(directories):
            raise InputError(f"--adapter must be NAME=INITIAL or NAME=INITIAL,TRAINED, not {text!r}")
        if name.strip() in adapters:
            raise InputError(f"--adapter: there are two of the name {name.strip()!r}")
        adapters[name.strip()] = [Path(directory) for directory in directories]
    return adapters


def _has_layers(values: Values) -> bool:
    return any(values[name] for name in ("covariances", "spaces", "adapter"))


@dataclass(frozen=True)
class Sources:
    """What the page is made of."""

    PANEL: ClassVar[str] = "Sources"

    covariances: Path | None = option("What `nullspace covariances` or `merge` wrote.", None)
    spaces: Path | None = option("What `nullspace compute` or `init` wrote.", None)
    model: str | None = option(
        "The untouched base model: hub name, folder, or .gguf file.",
        None,
        needs=needed("--covariances, --spaces or --adapter", _has_layers),
    )
    adapter: list[str] | None = option(
        "NAME=INITIAL[,TRAINED…]: what `nullspace init` wrote, or an adapter's directory, and those of it in training "
        "(a folder of Trainer's checkpoints stands for all of them); may be repeated.",
        None,
        parsed(_parse_adapters),
    )
    held_out: Path | None = option(
        "Second moments of text that is not in the calibration: the leak there. What `nullspace covariances` wrote.",
        None,
        needs=needed("--spaces or --adapter", lambda values: values["spaces"] or values["adapter"]),
    )
    task: Path | None = option(
        "Second moments of the task's inputs, for what a filter would give back: what `nullspace covariances` wrote.",
        None,
        needs=needed("--covariances and --adapter", lambda values: values["covariances"] and values["adapter"]),
    )
    study: Path | None = option("A preservation study: its directory, or the results.jsonl in it.", None)
    offload: bool = OFFLOAD._replace(needs=needed("--model", lambda values: values["model"] is not None))

    def spaces_directory(self) -> Path | None:
        """`--spaces`, or the null spaces beside the first adapter that has some."""
        if self.spaces is None:
            initials = [directories[0] / "spaces" for directories in _parse_adapters(self.adapter or []).values()]
            return next(filter(Path.is_dir, initials), None)
        return self.spaces / "spaces" if (self.spaces / "spaces").is_dir() else self.spaces

    def as_json(self) -> dict[str, Any]:
        """What was used, for the page and for the document."""
        paths = {
            "covariances": self.covariances,
            "spaces": self.spaces_directory(),
            "held_out": self.held_out,
            "task": self.task,
            "study": self.study,
        }
        adapters = _parse_adapters(self.adapter or [])
        return {
            "model": self.model,
            **{name: path and str(path) for name, path in paths.items()},
            "adapters": {name: [str(directory) for directory in directories] for name, directories in adapters.items()},
        }


def report(
    *,
    out: Path = option("The HTML file; must not exist yet."),
    sources: Sources,
    loading: Loading,
    overwrite: bool = OVERWRITE._replace(help="Replace an earlier page of ours."),
    as_json: bool = JSON._replace(help="All numbers as one JSON document on standard output."),
    quiet: bool = QUIET,
) -> dict[str, Any] | None:
    """One interactive HTML file: a verdict, effective ranks, spectra, leaks, and what training did to adapters, layer by layer."""
    try:
        from nullspace.reporting import page
    except ImportError as error:
        raise InputError(str(error)) from None
    from nullspace import analysis
    from nullspace.artifacts import store
    from nullspace.reporting import study

    began = time.perf_counter()
    has_layers = _has_layers(vars(sources))
    if not has_layers and sources.study is None:
        raise InputError("give at least one of --covariances, --spaces, --adapter and --study")
    with store.reserved(out, page.is_page, overwrite=overwrite):
        results = None
        if sources.study is not None:
            results = study.read_study(sources.study / study.RESULTS if sources.study.is_dir() else sources.study)
        analysed, filters = _analyse(sources, loading, quiet)
        findings, parts = _contents(results, analysed if has_layers else None, filters)
        used = sources.as_json()
        command = _command(out, sources, loading)
        page.write(out, _head(used, command, findings), parts, overwrite=overwrite)
    facts: dict[str, Any] = {"out": str(out), **used, "seconds": time.perf_counter() - began}
    facts["verdict"] = [finding._asdict() for finding in findings]
    if results is not None:
        facts["equal_loss"] = {name: study.as_json(study.at_equal_loss(results, name)) for name in study.MEASURES}
        facts["runs"] = study.as_json(study.over_seeds(results))
    if as_json:
        ranks, adapters = analysis.rank_summary(analysed), analysis.adapter_summary(analysed)
        return {**facts, **analysed._asdict(), "effective_ranks": ranks, "adapter_summary": adapters, "filters": filters}
    if not quiet:
        filled = sum(bool(part.figures) for part in parts)
        for finding in findings:
            console.print_line(f"{finding.about}: {finding.text}")
        console.print_line(f"{out}: {filled} sections with figures, {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return None


def _contents(study: Any, analysed: Analysis | None, filters: Mapping[str, list[Row]]) -> tuple[list[Finding], list[Section]]:
    """The verdict and the sections, those of a study first."""
    from nullspace.reporting import sections, verdict

    findings: list[Finding] = []
    parts: list[Section] = []
    if study is not None:
        parts += sections.study_sections(study)
        findings += verdict.study_verdict(study)
    if analysed is not None:
        parts += sections.sections(analysed)
        findings += verdict.verdict(analysed, filters)
    if filters:
        parts.append(sections.filter_section(filters))
    return findings, parts


def _analyse(sources: Sources, loading: Loading, quiet: bool) -> tuple[Analysis, dict[str, list[Row]]]:
    """The analysis of covariances, null spaces, weights and adapters; and adapter → what filters of rising strength leave."""
    from nullspace import Covariances, NullSpaces, analysis
    from nullspace.integrations.peft import read_course
    from nullspace.model.linear import is_linear

    courses = [read_course(name, *directories) for name, directories in _parse_adapters(sources.adapter or []).items()]
    given = (sources.covariances, sources.held_out, sources.task)
    covariances, held_out, task = (None if each is None else Covariances.load(each) for each in given)
    directory = sources.spaces_directory()
    spaces = None if directory is None else NullSpaces.load(directory)
    with console.Bars(quiet) as progress:
        modules = None
        if sources.model is not None:
            model, _ = load_model(loading.of(sources.model), progress, device="cpu", offload=sources.offload)
            modules = {name: module for name, module in model.named_modules() if is_linear(module)}
        analysed = analysis.analyse(covariances, spaces, modules=modules, courses=courses, held_out=held_out, progress=progress)
        trained = [course for course in courses if course.trained]
        filters = {course.name: _filters(course, task, covariances, analysed, progress) for course in trained if task is not None}
        return analysed, filters


def _filters(course: Any, task: Any, keep: Any, analysed: Analysis, progress: Progress) -> list[Row]:
    """What filters of rising strength leave of an adapter's last state, a row a strength."""
    from nullspace.analysis import update
    from nullspace.factors.filters import RIDGE
    from nullspace.integrations.peft.filtering.moments import Pair
    from nullspace.integrations.peft.filtering.paths import STRENGTHS, forecast

    pair, last = Pair(task, keep, RIDGE), course.trained[-1]
    changes = {name: update(start, last.factors[name]) for name, start in course.initial.items()}
    pair.check({name: ((len(b), a.shape[1]), None) for name, (a, b) in changes.items()}, f"adapter {course.name!r}")
    rows = (row for row in analysed.adapters if (row["adapter"], row["state"]) == (course.name, last.label))
    drifts = {row["layer"]: row["drift"] for row in rows if row["drift"] is not None}
    return [step._asdict() for step in forecast(changes, pair, drifts, STRENGTHS, 1.0, progress)[0].steps]


def _head(used: Mapping[str, Any], command: str, findings: list[Finding]) -> Any:
    """The head of the page: which model and methods, from what, by which versions and command, and the verdict."""
    import torch

    import nullspace
    from nullspace.integrations.peft.files import adapter_in, init_around
    from nullspace.reporting import charts, page

    records = {name: init_around(adapter_in(Path(directories[0]))) for name, directories in used["adapters"].items()}
    made = {name: f"{record['method']}, rank {record['rank']}" for name, record in records.items() if record is not None}
    model = used["model"] or next((str(record["model"]) for record in records.values() if record and record["model"]), None)
    title = f"Nullspace report: {Path(model).name if model else 'layer inputs, weights and adapters'}"
    methods = dict.fromkeys(record["method"] for record in records.values() if record is not None)
    versions = {"nullspace": nullspace.__version__, "Python": platform.python_version(), "torch": torch.__version__}
    facts = {
        "Model": model or "",
        "Method": "; ".join(f"{name}: {made.get(name, 'adapter without a record of ours')}" for name in records),
        "Date": datetime.date.today().isoformat(),
        "Versions": ", ".join(f"{name} {version}" for name, version in (versions | charts.versions()).items()),
        "Sources": _sources_line(used),
        "Command": command,
    }
    return page.Head(f"{title}, {' and '.join(methods)}" if methods else title, facts, findings)


def _command(out: Path, sources: Sources, loading: Loading) -> str:
    """The command that makes the page, without options that do not change it."""
    words = ["nullspace", "report"]
    for group in (sources, loading):
        for field in fields(group):
            value, flag = getattr(group, field.name), f"--{field.name.replace('_', '-')}"
            if value is True:
                words.append(flag)
            elif value:
                words += [word for each in (value if isinstance(value, list) else [value]) for word in (flag, str(each))]
    return shlex.join([*words, "--out", str(out)])


def _sources_line(sources: Mapping[str, Any]) -> str:
    given = [f"{what.replace('_', '-')} {value}" for what, value in sources.items() if value and what != "adapters"]
    given += [f"adapter {name} ({', '.join(directories)})" for name, directories in sources["adapters"].items()]
    return "; ".join(given)
