"""`nullspace report`: one HTML page of what earlier commands and trainings left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nullspace.cli import console
from nullspace.cli.calibrate import load_model
from nullspace.cli.options import JSON, OFFLOAD, OVERWRITE, QUIET, Loading, Values, needed, option, parsed
from nullspace.errors import InputError


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
        paths = {"covariances": self.covariances, "spaces": self.spaces_directory(), "study": self.study}
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
    """One HTML file: effective ranks, spectra, leaks, and what training did to adapters, layer by layer."""
    try:
        from nullspace.reporting import page, sections
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
        parts = [] if results is None else sections.study_sections(results)
        analysed = _analyse(sources, loading, quiet)
        parts += sections.sections(analysed) if has_layers else []
        used = sources.as_json()
        page.write(out, "Layer inputs, weights and adapters", _sources_line(used), parts, overwrite=overwrite)
    facts: dict[str, Any] = {"out": str(out), **used, "seconds": time.perf_counter() - began}
    if results is not None:
        facts["equal_loss"] = {name: study.as_json(study.at_equal_loss(results, name)) for name in study.MEASURES}
        facts["runs"] = study.as_json(study.over_seeds(results))
    if as_json:
        ranks, adapters = analysis.rank_summary(analysed), analysis.adapter_summary(analysed)
        return {**facts, **analysed._asdict(), "effective_ranks": ranks, "adapter_summary": adapters}
    if not quiet:
        filled = sum(bool(part.pictures) for part in parts)
        console.print_line(f"{out}: {filled} of {len(parts)} sections, {out.stat().st_size / 1e6:.1f} MB")
    return None


def _analyse(sources: Sources, loading: Loading, quiet: bool) -> Any:
    """The analysis of covariances, null spaces, weights and adapters."""
    from nullspace import Covariances, NullSpaces, analysis
    from nullspace.integrations.peft import read_course
    from nullspace.model.linear import is_linear

    courses = [read_course(name, *directories) for name, directories in _parse_adapters(sources.adapter or []).items()]
    covariances = None if sources.covariances is None else Covariances.load(sources.covariances)
    directory = sources.spaces_directory()
    spaces = None if directory is None else NullSpaces.load(directory)
    with console.Bars(quiet) as progress:
        modules = None
        if sources.model is not None:
            model, _ = load_model(loading.of(sources.model), progress, device="cpu", offload=sources.offload)
            modules = {name: module for name, module in model.named_modules() if is_linear(module)}
        return analysis.analyse(covariances, spaces, modules=modules, courses=courses, progress=progress)


def _sources_line(sources: dict[str, Any]) -> str:
    given = [f"{what} {value}" for what, value in sources.items() if value and what != "adapters"]
    given += [f"adapter {name} ({', '.join(directories)})" for name, directories in sources["adapters"].items()]
    return f"From {'; '.join(given)}."
