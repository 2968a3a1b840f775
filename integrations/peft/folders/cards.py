"""Model cards: the `README.md` of our folders, and a section for cards that PEFT or a person has written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from nullspace.errors import DamagedFileError
from nullspace.integrations.peft.origin import frozen_in
from nullspace.methods import OTHER

CARD = "README.md"
# Heading of the section that every card of an adapter for a residual base has.
RESIDUAL = "## Its base is a residual model"
# Of the section of an adapter beside a second one.
TWO = "## It comes in two"
# A residual base, from the adapter beside it.
BESIDE = "../base"
# The base in the table of a card of ours.
_BASE_ROW = re.compile(r"^\| base \| `(.+)` \|$", re.MULTILINE)
ADAPTERS = ("adapter", "trained", "subtracted", "export", "filtered", "combined")
TITLES = {
    "adapter": "LoRA adapter before training ({method})",
    "trained": "Trained LoRA adapter ({method})",
    "subtracted": "Frozen LoRA adapter that takes away what another one starts with",
    "base": "Residual base model ({method})",
    "export": "LoRA adapter for the untouched base",
    "filtered": "LoRA adapter, filtered to forget less",
    "combined": "LoRA adapter in place of several",
    "model": "Model, filtered to forget less",
}

# What servers do with adapters of experts that are one tensor.
EXPERTS_SERVED = (
    "{count} of its layers are experts' matrices, in the form of PEFT's target_parameters (PEFT 0.19 and later). vLLM reads it for "
    "GPT-OSS, Qwen3.5-MoE and Qwen3-VL-MoE, and with --enable-mixed-moe-lora-format for Qwen3-MoE and DeepSeek-V3; for Mixtral and "
    "Gemma 4 it drops the experts without a message, and SGLang drops them with a warning. Compare a server's outputs with PEFT's, "
    "or merge (merge_and_unload)."
)

FILTERED = {
    "filtered": "## What was done\n\nThe change of every weight, ΔW, became ΔW T (T + μ C)⁻¹: of all changes the one that answers "
    "the task's inputs (second moment T) as ΔW does, and is small on the inputs that are to be kept (second moment C), weighed by "
    "μ.",
    "combined": "## What was done\n\nOne change of every weight in place of several, Σ ΔW_i T_i (Σ T_i + μ C)⁻¹: each answers the "
    "inputs of its own task (second moment T_i) as before, and together they are small on the inputs that are to be kept (second "
    "moment C).",
}


def write_card(directory: Path, kind: str, facts: Mapping[str, Any], base: str | None) -> None:
    """Write the `README.md` of a folder. It does not name the folder's own path, so it stays right when the folder is moved.

    Args:
        directory: where to write it.
        kind: one of `TITLES`.
        facts: the manifest of an init or an export: model (the untouched one), method, rank, alpha, leak, …; any may be missing.
        base: name or path of the model that the folder's content is for or, for a base, was made from.
    """
    title = TITLES[kind].format(method=facts.get("method") or "unknown method")
    parts = [f"# {title}", _table(kind, facts, base), *_sections(kind, facts, base)]
    card = ModelCard(f"---\n{_metadata(kind, facts, base).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
    card.save(directory / CARD)


def write_cards(part: Path, facts: Mapping[str, Any]) -> None:
    """Write the cards of an init's folders.

    Args:
        part: where the folders are now.
        facts: the init's manifest.
    """
    model = facts.get("model")
    for kind, base in (("adapter", BESIDE if facts.get("residual") == "base" else model), ("subtracted", model), ("base", model)):
        if (part / kind).is_dir():
            write_card(part / kind, kind, facts, base)


def name_base(directory: Path, facts: Mapping[str, Any] | None, base: str) -> None:
    """Write another base into an adapter's card. A card that is not ours keeps its text, and gets the notice on residual bases.

    Args:
        directory: of the adapter.
        facts: of the init whose residual the base is; None if the base is untouched.
        base: hub name or absolute path.
    """
    path = directory / CARD
    if not path.exists():
        write_card(directory, "trained", facts or {}, base)
        return
    try:
        card = ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        raise DamagedFileError(f"{path} is no model card: {error}") from error
    tags, before = card.data.tags, _BASE_ROW.search(card.text)
    card.data.base_model = _on_hub(base)
    if isinstance(tags, list):  # PEFT's own names the base once more
        card.data.tags = [tag for tag in tags if not str(tag).startswith("base_model:")]
    if before is not None and (before[1] == BESIDE or os.path.isabs(before[1])):
        card.text = card.text.replace(before[1], base)
    notice = _notice(facts or {})
    if notice and notice.partition("\n")[0] not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{notice}\n"
    card.save(path)


def set_section(directory: Path, heading: str, text: str) -> None:
    """Write a section into the card of an adapter, at its place if there is one of this heading, else at the end.

    Args:
        directory: with a card.
        heading: of the second level, `## …`.
        text: without headings of the second level.
    """
    card = ModelCard.load(directory / CARD)
    before, found, rest = f"\n{card.text}".partition(f"\n{heading}\n")
    behind = rest.partition("\n## ") if found else ("", "", "")
    card.text = f"{before.rstrip()}\n\n{heading}\n\n{text}\n\n{behind[1].lstrip()}{behind[2]}".strip() + "\n"
    card.save(directory / CARD)


def says_residual(directory: Path) -> bool:
    """Whether the card of an adapter says that its base is a residual model."""
    return _has_section(directory, RESIDUAL)


def says_two(directory: Path) -> bool:
    """Whether the card of an adapter says that a second one takes away what it starts with."""
    return _has_section(directory, TWO)


def _has_section(directory: Path, heading: str) -> bool:
    try:
        return heading in (directory / CARD).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False


def _metadata(kind: str, facts: Mapping[str, Any], base: str | None) -> ModelCardData:
    method = facts.get("method")
    return ModelCardData(
        base_model=_on_hub(base),
        library_name="peft" if kind in ADAPTERS else "transformers",
        pipeline_tag="text-generation" if str(facts.get("architecture")).endswith("ForCausalLM") else None,
        tags=[*(["lora"] if kind in ADAPTERS else []), "nullspace", *([str(method)] if method else [])],
    )


def _on_hub(name: str | None) -> str | None:
    """A name if it may be one of the hub, which refuses cards whose metadata have a path as `base_model`."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return name


def _table(kind: str, facts: Mapping[str, Any], base: str | None) -> str:
    leak = facts.get("leak")
    rows = {
        "made of" if kind == "base" else "base": base,
        "untouched model": facts.get("model") if base != facts.get("model") else None,
        "method": facts.get("method"),
        "data": facts.get("data"),
        "rank": _rank(facts),
        "alpha": facts.get("alpha"),
        "rsLoRA": "yes" if facts.get("use_rslora") else None,
        "leak": f"{leak['median']:.2e} (median), {leak['worst']:.2e} (worst, {leak['worst_site']})" if leak else None,
        **_filter_rows(facts.get("filter")),
        "also holds": ", ".join(facts.get("holds") or ()) or None,
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {code(value)} |" for name, value in rows.items() if value is not None)])


def _rank(facts: Mapping[str, Any]) -> Any:
    """The rank, or how the ranks of a budget are distributed."""
    budget = facts.get("rank_budget")
    if budget is None:
        return facts.get("rank")
    more = budget["gain"] / budget["uniform_gain"] - 1 if budget["uniform_gain"] else 0.0
    return (
        f"{budget['smallest']} to {budget['largest']} ({budget['parameters']:,} trained parameters, where they buy most: "
        f"{more:+.2g} of the objective of uniform ranks)"
    )


def _filter_rows(facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """Rows of a filter: how it was chosen, and what it forecasts."""
    if facts is None:
        return {}
    rows = {"filter": f"μ = {facts['strength']:.4g}, ridge {facts['ridge']:.3g}, then times {facts['scale']:g}"}
    for name, title in (
        ("task", "task"),
        ("tasks", "tasks"),
        ("keep", "kept"),
        ("drift", "drift before and after"),
        ("left", "of its norm on what is kept"),
        ("response", "of its norm on the task"),
    ):
        value = facts.get(name)
        rows[title] = " → ".join(f"{each:.3g}" for each in value) if isinstance(value, list) and name == "drift" else value  # type: ignore[assignment]
    return {title: f"{value:.3g}" if isinstance(value, float) else value for title, value in rows.items()}


def code(value: Any) -> str:
    """A value as a code span; backticks and line breaks in it are replaced."""
    text = " ".join(str(value).replace("`", "'").replace("|", "¦").split())
    return f"`{text}`" if text else ""


def _sections(kind: str, facts: Mapping[str, Any], base: str | None) -> list[str]:
    if kind == "base":
        return [
            "The weights are W₀ − s·BA: the model is complete only with its adapter (`adapter` beside this folder, or what that "
            f"was trained to), and then starts as {code(facts.get('model') or 'the untouched model')}. Do not use it alone, and do "
            "not train another adapter on it alone.",
            f"## Load\n\n{_example(facts, '.', '../adapter')}",
        ]
    if kind == "model":
        return [FILTERED["filtered"], "Tensors without second moments are as they were trained."]
    if kind == "subtracted":
        return [
            "Load it beside the adapter that it belongs to, on the untouched model, and keep both active:\n\n"
            "```python\nfrom nullspace.integrations.peft import attach_subtracted\n\n"
            "attach_subtracted(model, '.')  # in this folder\n```"
        ]
    example = f"## Load\n\n{_example(facts, base)}"
    if kind in FILTERED:
        return [example, FILTERED[kind]]
    if kind != "export":
        return [example, *filter(None, [_frozen(facts), _notice(facts)])]
    limit = facts.get("max_lora_rank")
    serve = [
        "α is the rank and all layers have one rank, so that the scaling is 1 wherever it is read.",
        f"vLLM: `--max-lora-rank {limit}`." if limit else "vLLM serves no rank as large as this.",
        "PEFT loads what it also holds; servers such as vLLM and llama.cpp do not." if facts.get("holds") else "",
        EXPERTS_SERVED.format(count=facts["experts"]) if facts.get("experts") else "",
    ]
    return [example, "## Serve\n\n" + " ".join(serve).strip()]


def _example(facts: Mapping[str, Any], base: str | None, adapter: str = ".") -> str:
    architecture = str(facts.get("architecture") or "")
    if architecture.endswith("ForCausalLM") or not hasattr(transformers, architecture or "-"):
        architecture = "AutoModelForCausalLM" if architecture.endswith("ForCausalLM") else "AutoModel"
    return (
        "In this folder (from elsewhere, with its path or hub name):\n\n```python\nfrom peft import PeftModel\n"
        f"from transformers import {architecture}\n\n"
        f"base = {architecture}.from_pretrained({base or 'the untouched model'!r})\n"
        f"model = PeftModel.from_pretrained(base, {adapter!r})  # is_trainable=True to train it\n```"
    )


def _frozen(facts: Mapping[str, Any]) -> str:
    """The section on training one factor alone; empty if both are trained."""
    frozen = frozen_in(facts)
    if frozen is None:
        return ""
    return (
        f"## {frozen} is frozen\n\nThis adapter trains {OTHER[frozen]} alone. PEFT loads {frozen} trainable: to train it on, call "
        f"`freeze_{frozen.lower()}(model)` of `nullspace.integrations.peft` after loading it, before the optimizer is made."
    )


def _notice(facts: Mapping[str, Any]) -> str:
    """The notice on an adapter's base; empty if the base is an ordinary model."""
    model = code(facts.get("model") or "the untouched model")
    if facts.get("residual") == "adapter":
        return (
            f"{TWO}\n\nThe frozen adapter in `subtracted`, in the folder in which this one started, takes away what "
            f"it starts with. On {model} without that one, outputs are wrong and nothing fails. `attach_subtracted` of "
            "`nullspace.integrations.peft` loads it; `nullspace export` makes one plain adapter of both. To share this one, share "
            "both, or the export."
        )
    if facts.get("residual") != "base":
        return ""
    return (
        f"{RESIDUAL}\n\nIt is not {model}, but {model} less what the adapter starts with: W₀ − s·BA. Adapter and base belong "
        "together.\n\n"
        f"- Do not load the adapter on {model}, nor on another residual base: outputs are wrong, and nothing fails. For the "
        "untouched model: `nullspace export TRAINED --initial INIT --out EXPORTED`.\n"
        "- `disable_adapter()` leaves the residual model, which is no reference model.\n"
        "- Do not train a second plain adapter on the residual base alone.\n"
        "- PEFT reads the base's place from `adapter_config.json`. After folders were moved or uploaded, "
        "`nullspace inspect ADAPTER` says whether it is still right, and `--base FOLDER_OR_NAME` writes it.\n"
        "- To share it, upload the folder of the base as a model, write its name here with `--base`, then upload this folder. An "
        "export needs no base of its own."
    )
