"""`describe` and `set_base`: what a folder holds (init, adapter, residual base, export, …), and which base it needs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nullspace.artifacts import checkpoint, records, store
from nullspace.errors import InputError, MissingFileError, OtherModelError
from nullspace.integrations.peft import made_for
from nullspace.integrations.peft.experts.layout import Place
from nullspace.integrations.peft.files import (
    A_WEIGHT,
    ADAPTER_CONFIG,
    PREFIX,
    Adapter,
    adapter_in,
    init_around,
    located,
    places_in,
    read_adapter,
    read_init,
    scaling_of,
)
from nullspace.integrations.peft.folders import cards
from nullspace.integrations.peft.folders.checkpoints import has_recorded_weights, is_residual, local_folder, mark_of
from nullspace.integrations.peft.folders.export import PLAIN, contents, described, vllm_rank
from nullspace.integrations.peft.origin import frozen_in, recorded
from nullspace.integrations.transformers.load import ModelSource
from nullspace.methods import OTHER

MODEL_CONFIG = "config.json"
# Fields of an init record about the method.
METHOD_FACTS = ("model", "method", "data", "leak", "architecture")


class Base(NamedTuple):
    """The base model that an adapter is for."""

    named: str | None
    """As in the adapter's configuration."""
    folder: Path | None
    """Where it is on this machine, if known."""
    residual: bool | None
    """Whether it is a residual model; None if nothing says that."""
    init: Mapping[str, Any]
    """What is known of the init that the adapter or its base comes from; empty if nothing is."""
    problem: str | None = None
    """Why the base is not the one that the adapter was made for, to follow "it" (`made_for.problem`)."""


def describe(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What a folder holds, as JSON takes it.

    Args:
        directory: what `save_init`, `write_init` or `export_lora` wrote, a folder in it, a PEFT LoRA adapter in or after training,
            or a transformers checkpoint.

    Returns:
        `kind` (`"init"`, `"adapter"`, `"export"`, `"filtered"`, `"combined"`, `"residual base"`, `"model"` or `"checkpoint"`),
        `notes` (sentences on what to do and what to avoid), and of adapters, as far as known: `base` (as in their configuration),
        `base_kind` (`"residual"`, `"untouched"` or `"unknown"`), `base_found` (its folder here), `base_problem` (why that is not
        the base that the adapter was made for, if its files show it), `rank`, `alpha`, `scaling`, `layers`, `experts` (the layers
        among them that are experts' matrices in one tensor), `method`, `model`, `data`, `leak`, ….

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: naming the file, if one is damaged, or if the folder holds nothing of these kinds.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise MissingFileError(f"{directory} is not a directory; for a hub name, give the folder that 'hf download' prints")
    if records.kind_of(directory) == "init":
        init = read_init(directory)
        facts = _adapter(directory / "adapter")
        return {
            **facts,
            "directory": str(directory),
            "kind": "init",
            "adapter": str(directory / "adapter"),
            "residual": init.get("residual"),
        }
    if (directory / ADAPTER_CONFIG).is_file():
        return _adapter(directory)
    if (directory / MODEL_CONFIG).is_file():
        return _model(directory)
    if (directory / checkpoint.RUN).is_file():
        note = "What an interrupted run has finished: the same command goes on behind it."
        facts = {"directory": str(directory), "kind": "checkpoint", "run": records.read_json(directory / checkpoint.RUN)}
        return {**facts, "sites_finished": checkpoint.sites_in(directory), "notes": [note]}
    raise InputError(
        f"{directory} holds nothing that is known here: neither {records.MANIFEST}, {ADAPTER_CONFIG} nor {MODEL_CONFIG} is in it"
    )


def set_base(directory: str | os.PathLike[str], base: str) -> None:
    """Write into an adapter's configuration and card which base it needs, after one of them was moved or uploaded.

    Args:
        directory: of the adapter, or what `save_init` wrote.
        base: a folder, which is written as an absolute path, or a hub name.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if the folder holds no model, or one that the adapter was not made for (a residual base where it needs the
            untouched one or the other way round, the residual of another start, a model with other weights); if the adapter's
            files are links into the hub's cache, which other snapshots share.
    """
    adapter = read_adapter(adapter_in(Path(directory)))
    if any((adapter.path / name).is_symlink() for name in (ADAPTER_CONFIG, cards.CARD)):
        raise InputError(
            f"{adapter.path} is a snapshot of the hub's cache, whose files are links: copy it (cp -rL, or hf download "
            "--local-dir), and set the base of the copy"
        )
    old, named = base_of(adapter), located(base)
    assert named is not None
    # A revision is one of the repository that was named before.
    revision = adapter.config.get("revision") if named == old.named else None
    folder = _folder(named, revision)
    if folder is not None:
        _check_base(adapter, old, named, folder)
    residual = folder is not None and is_residual(folder)
    cards.name_base(adapter.path, _init_of(folder) if folder is not None and residual else old.init, named)
    config = {**adapter.config, "base_model_name_or_path": named, "revision": revision}
    path = adapter.path / ADAPTER_CONFIG
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    store.sync(part)
    part.replace(path)


def _check_base(adapter: Adapter, old: Base, named: str, folder: Path) -> None:
    """Raise `ValueError` if the model in a folder is none, or cannot be the base of an adapter.

    Args:
        adapter: the adapter.
        old: its base until now.
        named: the new one, as the caller names it.
        folder: where that is.
    """
    if not (folder / MODEL_CONFIG).is_file():
        raise InputError(f"{named} holds no model: {MODEL_CONFIG} is missing")
    # A base of this name that is not on this machine may be one of save_init.
    needs_residual = old.residual or (old.residual is None and Path(old.named or "").name == "base")
    if needs_residual and not is_residual(folder):
        raise InputError(
            f"{adapter.path} needs the residual base that it was made with ({old.named}), and {named} is none: for an untouched "
            "model, use nullspace export"
        )
    problem = _problem(recorded(adapter.config, adapter.path), named, folder)
    if problem is not None:
        raise OtherModelError(f"{adapter.path} {problem}")


def _problem(record: Mapping[str, Any], named: str, folder: Path) -> str | None:
    """Why the model in a folder is not the one that an adapter was made for, as far as its files show."""
    mark = (mark_of(folder) or {}) if is_residual(folder) else None
    same = has_recorded_weights(folder, record.get("base") or {}) if mark is None else None
    return made_for.problem(record, named, mark, same)


def _init_of(base: Path) -> Mapping[str, Any]:
    return {
        "residual": "base",
        **{name: (mark_of(base) or {}).get(name) for name in ("model", "method")},
        **(init_around(base) or {}),
    }


def base_of(adapter: Adapter) -> Base:
    """The base of an adapter: the one beside it, if both are in one init, else the one that its configuration names."""
    record = recorded(adapter.config, adapter.path)
    base = _base_at(adapter, record)
    if base.folder is None:
        return base
    return base._replace(problem=_problem(record, base.named or str(base.folder), base.folder))


def _base_at(adapter: Adapter, record: Mapping[str, Any]) -> Base:
    named = adapter.config.get("base_model_name_or_path")
    folder = Path(os.path.abspath(adapter.path))
    named_folder = _folder(named, adapter.config.get("revision"))
    start = {name: record[name] for name in ("model", "residual", "freeze_a", "freeze_b") if name in record}
    if records.kind_of(folder) in PLAIN:
        return Base(named, named_folder, False, start)
    init = init_around(folder)
    beside = folder.parent / "base"
    if init is not None and (folder.name in ("adapter", "subtracted") or named_folder is None):
        if beside.is_dir():
            return Base(named, beside, True, init)
        return Base(named, named_folder, init.get("residual") == "base", init)
    needs_residual = None if record.get("residual") is None else record["residual"] == "base"
    if named_folder is None:
        says = True if cards.says_residual(folder) else None
        return Base(named, None, says if needs_residual is None else needs_residual, start)
    residual = is_residual(named_folder)
    known = {**start, **_init_of(named_folder)} if residual and needs_residual is not False else start
    return Base(named, named_folder, residual if needs_residual is None else needs_residual, known)


def _is_at(name: str, folder: Path) -> bool:
    """Whether a name leads to a folder from every working directory."""
    return os.path.isabs(name) and os.path.exists(name) and os.path.samefile(name, folder)


def _folder(name: str | None, revision: str | None) -> Path | None:
    """A base's folder on this machine, which may be in the hub's cache."""
    folder = local_folder(ModelSource.in_revision(name, revision)) if name else None
    return None if folder is None else Path(os.path.abspath(folder))


def _adapter(directory: Path) -> dict[str, Any]:
    adapter = read_adapter(directory)
    base = base_of(adapter)
    layers = places_in(adapter)
    ranks = {name: len(adapter.tensors[f"{PREFIX}{place.path}{A_WEIGHT}"]) // place.experts for name, place in layers.items()}
    scalings = {scaling_of(adapter.config, layer, rank) for layer, rank in ranks.items()}
    rank, holds = max(ranks.values(), default=None), contents(adapter.tensors)
    return {
        "directory": str(directory),
        "kind": kind if (kind := records.kind_of(directory)) in PLAIN else "adapter",
        "base": base.named,
        "base_kind": {True: "residual", False: "untouched", None: "unknown"}[base.residual],
        "base_found": None if base.folder is None else str(base.folder),
        "base_problem": base.problem,
        **{name: base.init.get(name) for name in METHOD_FACTS},
        "layers": len(ranks),
        "experts": sum(place.number is not None for place in layers.values()),
        "rank": rank,
        "alpha": adapter.config.get("lora_alpha"),
        "scaling": scalings.pop() if len(scalings) == 1 else sorted(scalings),
        "use_rslora": bool(adapter.config.get("use_rslora")),
        "use_dora": bool(adapter.config.get("use_dora")),
        "holds": holds,
        "notes": [*_base_notes(adapter, base), *_serving_notes(adapter, base, layers, max(ranks.values(), default=0), holds)],
    }


def _base_notes(adapter: Adapter, base: Base) -> list[str]:
    original = base.init.get("model") or "the untouched model"
    notes = []
    if base.residual:
        missing = f"that it was made with, which is missing: {base.named}"
        where = base.folder if base.folder is not None and base.problem is None else missing
        notes.append(
            f"It needs the residual base {where}. On {original} it is silently wrong: for that one, nullspace export TRAINED "
            "--initial INIT --out EXPORTED"
        )
    elif base.residual is False:
        notes.append(f"It is for the untouched base {base.named or original}.")
    else:
        notes.append(
            f"Its base {base.named!r} is not a folder on this machine. If it is a residual base, nothing but that one will do: "
            "the adapter is silently wrong on the untouched model."
        )
    if base.problem:
        notes.append(f"It {base.problem}.")
    if base.init.get("residual") == "adapter":
        notes.append(
            "It takes away what another adapter starts with, and does nothing else: attach_subtracted loads it beside that one."
            if adapter.path.name == "subtracted"
            else "The frozen adapter in 'subtracted' must be active beside it (attach_subtracted; it is in the folder in which "
            "this one started): alone it is silently wrong. nullspace export makes one plain adapter of both."
        )
    record = recorded(adapter.config, adapter.path)
    frozen = frozen_in(record if "freeze_a" in record else base.init)
    if frozen and adapter.path.name != "subtracted":
        notes.append(
            f"It trains {OTHER[frozen]} alone, and PEFT loads {frozen} trainable: to train it on, call "
            f"freeze_{frozen.lower()} after loading it."
        )
    if base.named and base.folder is not None and not _is_at(base.named, base.folder):
        notes.append(
            f"{ADAPTER_CONFIG} names {base.named!r}, but the base is in {base.folder}: nullspace inspect {adapter.path} --base "
            f"{base.folder} writes that"
        )
    elif base.folder is None and (base.residual is not False or os.path.isabs(base.named or "")):
        missing = f"{base.named} is not on this machine. " if base.residual is False else ""
        notes.append(f"{missing}Where the base is elsewhere: nullspace inspect {adapter.path} --base FOLDER_OR_NAME")
    return notes


def _serving_notes(adapter: Adapter, base: Base, layers: Mapping[str, Place], rank: int, holds: dict[str, list[str]]) -> list[str]:
    notes = []
    odd = [name for name in ("use_rslora", "rank_pattern", "alpha_pattern") if adapter.config.get(name)]
    if odd:
        notes.append(
            f"{', '.join(odd)}: servers that read only r and lora_alpha apply another scaling; nullspace export folds it in."
        )
    if holds:
        notes.append(f"It also holds {described(holds)}: PEFT loads them, servers such as vLLM and llama.cpp do not.")
    alone = base.init.get("residual") != "adapter" or records.kind_of(adapter.path) in PLAIN
    if base.residual is False and alone and rank and not odd:
        limit = vllm_rank(rank)
        notes.append(f"vLLM needs --max-lora-rank {limit}." if limit else "vLLM serves no rank as large as this.")
    experts = sum(place.number is not None for place in layers.values())
    if experts and base.residual is False:
        notes.append(cards.EXPERTS_SERVED.format(count=experts))
    return notes


def _model(directory: Path) -> dict[str, Any]:
    directory = Path(os.path.abspath(directory))
    if not is_residual(directory):
        note = "A transformers checkpoint that nothing marks as a residual base."
        return {"directory": str(directory), "kind": "model", "notes": [note]}
    init = _init_of(directory)
    beside = directory.parent / "adapter"
    adapter = str(beside) if beside.is_dir() else None
    note = (
        f"A residual base, W₀ − s·BA of {init.get('model') or 'the untouched model'}: for {adapter or 'its adapter'} and what that "
        "is trained to. Do not use it alone, nor for another adapter."
    )
    return {
        "directory": str(directory),
        "kind": "residual base",
        **{name: init.get(name) for name in (*METHOD_FACTS, "rank", "alpha")},
        "adapter": adapter,
        "notes": [note],
    }
