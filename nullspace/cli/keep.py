"""`nullspace merge`, `inspect` and `export`: what was kept before is added, shown, or made into a plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nullspace.cli import console, options
from nullspace.cli.options import Shown, ShownTable, needed, option

_CUT = needed("--rank", lambda values: values["rank"] is not None)


def merge(
    *,
    runs: list[Path] = option("What `nullspace covariances` wrote, of one model.", typed=()),
    out: Path = option("Directory for the sums; must not exist yet."),
    weights: str | None = option("A factor a run: '2,1'; 1 by default.", None, options.parsed(options.parse_weights)),
    normalise: bool = option("Divide each run by its trace first: several tasks that are to count alike.", False),
    partial: bool = option("Shards may be missing: a merge on the way, to be merged with others.", False),
    keep: str = options.KEEP,
    shown: ShownTable,
) -> dict[str, Any] | None:
    """Add second moments: the shards of one data set, more data later, several corpora or tasks."""
    import torch

    from nullspace import Covariances
    from nullspace.artifacts import store

    with store.reserved(out, overwrite=shown.overwrite):
        factors = None if weights is None else options.parse_weights(weights)
        loaded = [Covariances.load(run, partial=True) for run in runs]
        merged = Covariances.merge(loaded, weights=factors, normalise=normalise, partial=partial)
        merged.save(out, overwrite=shown.overwrite, dtype=getattr(torch, keep))
        facts = {"out": str(out), "runs": [str(run) for run in runs], "weights": factors, "normalise": normalise}
        written = Covariances.load(out, partial=True)
        return console.show_covariances(written, facts, as_json=shown.as_json, quiet=shown.quiet, all_rows=shown.all_rows)


def inspect(
    *,
    directory: Path = option(
        "What `nullspace compute`, `init`, `export`, `covariances` or `merge` wrote, or a folder in it; an adapter in or after "
        "training; a model.",
        typed=(),
    ),
    base: str | None = option(
        "Write into the adapter's configuration and card that its base is this folder or hub name, now.", None
    ),
    all_rows: bool = options.ALL_ROWS,
    as_json: bool = options.JSON,
) -> dict[str, Any] | None:
    """Show null spaces (leak, gap, tokens and outliers of every site), covariances, or which base an adapter needs."""
    from nullspace import Covariances, NullSpaces
    from nullspace.artifacts import records
    from nullspace.integrations import peft

    if base is not None:
        peft.set_base(directory, base)
    kind, facts = records.kind_of(directory), {"directory": str(directory)}
    if kind == "covariances":
        return console.show_covariances(Covariances.load(directory, partial=True), facts, as_json=as_json, all_rows=all_rows)
    if kind == "spaces":
        return console.show_spaces(NullSpaces.load(directory), facts, as_json=as_json, all_rows=all_rows)
    described = peft.describe(directory)
    if not as_json:
        _print_facts(described)
    if (directory / "spaces").is_dir():
        return console.show_spaces(NullSpaces.load(directory / "spaces"), described, as_json=as_json, all_rows=all_rows)
    return described if as_json else None


def _print_facts(facts: dict[str, Any]) -> None:
    """What is known of a folder, a line a fact, and sentences on what to do with it."""
    leak = facts.get("leak")
    shown = {**facts, "leak": leak and f"{leak['median']:.2e} (median), {leak['worst']:.2e} (worst, {leak['worst_site']})"}
    for name, value in shown.items():
        if name not in ("notes", "holds", "base_problem") and value not in (None, False):
            console.print_line(f"{name.replace('_', ' '):12} {' '.join(str(value).split())}")
    for note in facts["notes"]:
        console.print_line(f"\n{note}")
    console.print_line("")


def export(
    *,
    trained: Path = option("Directory of the trained adapter.", typed=()),
    initial: Path = option("What `nullspace init` wrote, or the adapter directory in it."),
    out: Path = option("Directory for the plain LoRA; must not exist yet."),
    base: str | None = option("Name of the untouched base; by default that which `init` was given.", None),
    rank: int | None = options.RANK._replace(help="Cut the change to this rank; by default it is not cut.", default=None),
    covariances: Path | None = option(
        "What `nullspace covariances` or `merge` wrote of the task's data: the cut then changes the outputs on its inputs least.",
        None,
        needs=_CUT,
    ),
    shown: Shown,
) -> dict[str, Any] | None:
    """A trained adapter as a plain LoRA for the untouched base: rank r where A was frozen, 2r otherwise, or cut to --rank."""
    from nullspace.artifacts import records, store
    from nullspace.integrations.peft import export_lora

    with store.reserved(out, overwrite=shown.overwrite):
        export_lora(trained, initial, out, base=base, rank=rank, covariances=covariances, overwrite=shown.overwrite)
        manifest = records.read_manifest(out, "export")
    if shown.as_json:
        facts = {name: manifest[name] for name in ("rank", "alpha", "max_lora_rank", "holds")}
        return {"out": str(out), "base": manifest["model"], "truncated": manifest.get("truncated"), **facts}
    if not shown.quiet:
        limit = manifest["max_lora_rank"]
        server = f"vLLM needs --max-lora-rank {limit}" if limit else "vLLM serves no rank as large as that"
        console.print_line(f"{out}: rank {manifest['rank']}, alpha {manifest['alpha']}, for {manifest['model']}; {server}")
        if "truncated" in manifest:
            console.print_line(_cut(manifest["truncated"]))
    return None


def _cut(facts: dict[str, Any]) -> str:
    """What a cut to a smaller rank has cost, as text."""
    lost = f"{facts['lost']:.2g} (median of the layers), {facts['worst']:.2g} (worst, {facts['worst_layer']})"
    if facts["weighted"]:
        return f"cut to rank {facts['rank']}: lost of ‖ΔW X‖ on these inputs {lost}"
    return f"cut to rank {facts['rank']}: lost of ‖ΔW‖ {lost}. The inputs were not looked at: --covariances weighs by them"
