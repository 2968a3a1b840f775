"""`export_lora`: after training, a plain LoRA for the untouched base."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from nullspace.artifacts import records, store
from nullspace.artifacts.locks import temporary_folder
from nullspace.artifacts.shared_writes import written_once
from nullspace.errors import AdapterWarning, InputError, OtherModelError
from nullspace.factors import LowRank
from nullspace.integrations.peft.experts.layout import Place, layout_of, places, stacked
from nullspace.integrations.peft.files import (
    A_WEIGHT,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    B_WEIGHT,
    PREFIX,
    Adapter,
    adapter_in,
    init_around,
    layer_of,
    located,
    places_in,
    read_adapter,
    save_adapter,
    scaling_of,
)
from nullspace.integrations.peft.filtering.moments import Moments
from nullspace.integrations.peft.folders.cards import write_card
from nullspace.integrations.peft.folders.checkpoints import has_recorded_weights, is_residual, local_folder, mark_of, what_differs
from nullspace.integrations.peft.folders.cut import Cut
from nullspace.integrations.peft.origin import check_origin, for_untouched, recorded
from nullspace.integrations.transformers.load import ModelSource
from nullspace.model.wrappers import unwrap, unwrapped

# An initial adapter with ‖B A‖ / (‖B‖ ‖A‖) below this has left its base alone.
ORTHOGONAL = 1e-6
# Kinds of our directories that hold an adapter for an untouched base.
PLAIN = ("export", "filtered", "combined")
# What vLLM's --max-lora-rank accepts.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def export_lora(
    trained: PeftModel | str | os.PathLike[str],
    initial: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    rank: int | None = None,
    covariances: Moments | None = None,
    overwrite: bool = False,
) -> Path:
    """Write, after training, a plain LoRA for the *untouched* base model, equivalent to the trained adapter on the residual one.

    With W₀ = W_res + s·B₀A₀, the trained model is W_res + s·BA = W₀ + s·(BA − B₀A₀). Where A was frozen that is s·(B − B₀)A₀, and
    where B was s·B₀(A − A₀), of rank r; otherwise `[s·B, −s·B₀][A; A₀]`, of rank 2r.

    The scaling s is in B, so that α = r, without rsLoRA and without patterns: consumers that read only `r` and `lora_alpha`
    (llama.cpp, older vLLM) apply what PEFT does. Layers of a smaller rank are padded with zeros to the largest. The factors have
    the trained adapter's dtype where it holds them exactly, else at least float32.

    In a process group, one process may call this, or all of them: then one writes, and the others return when it has.

    Args:
        trained: the trained model, or the directory of its adapter. If the model's weights are spread over several ranks (FSDP2,
            ZeRO-3), all of these have to call this: the adapter is gathered.
        initial: what `save_init` or `write_init` wrote, or the adapter directory in it.
        out: directory of the new adapter; written whole or not at all.
        base: name or path of the untouched base, written into the adapter's configuration. By default that which `initial` was
            made of. If its files are on this machine, they are compared with the base that the adapter was trained on.
        rank: of the new adapter, at most: layers of a larger one are cut by `nullspace.factors.truncated`.
        covariances: second moments of the inputs on which the cut is to change least, those of the task: an object or its
            directory. Without them the cut is the nearest in the Frobenius norm, whatever the inputs.
        overwrite: replace an earlier export.

    Returns:
        The path of `out`.

    Raises:
        FileNotFoundError: if an adapter file is missing.
        ValueError: naming the file, if it is damaged, the two adapters do not belong together, or they have DoRA's magnitudes
            and a residual base, for which there is no LoRA on the untouched one; naming the tensor, if it holds NaN or Inf, or if
            the untouched base lacks it or has another one; if the untouched base is not known; for a `rank` below 1 or with DoRA,
            covariances without a `rank`; naming the layer, if they do not have it.
        FileExistsError: if `out` is in the way, or another run is writing to it.

    Warns:
        UserWarning: naming them, if the adapter holds more than A and B (DoRA's magnitudes, whole modules, tokens, biases).
    """
    trained = unwrap(trained)
    if isinstance(trained, PeftModel):
        with temporary_folder() as folder, unwrapped(trained):
            save_adapter(trained, trained.active_adapter, folder)
            return export_lora(folder, initial, out, base=base, rank=rank, covariances=covariances, overwrite=overwrite)
    cut = Cut.of(rank, covariances)
    now, start = read_adapter(Path(trained)), read_adapter(adapter_in(Path(initial)))
    check_pair(now, start, stacklevel=2)
    layers = places_in(now)
    untouched = all(is_zero(*_factors(start, place)) for place in layers.values())
    if now.config.get("use_dora") and not untouched:
        raise InputError(
            f"{now.path} uses DoRA on a residual base: its magnitudes scale the sum of both, which no LoRA on the untouched base "
            "does; serve it on the residual base, or merge it there (merge_and_unload)"
        )
    init = init_around(start.path) or {}
    revision = now.config.get("revision") if base is None or base == init.get("model") else None
    base = located(base) or original_base(start, untouched)
    _check_base(ModelSource.in_revision(base, revision), start, now)
    factors = {layer: _plain_factors(now, start, layer, place) for layer, place in layers.items()}
    if cut is not None:
        factors = cut.apply(factors, now)
    dtype = now.tensors[f"{PREFIX}{next(iter(layers.values())).path}{A_WEIGHT}"].dtype
    if not all(torch.equal(factor.to(dtype).double(), factor) for pair in factors.values() for factor in pair):
        dtype = torch.promote_types(dtype, torch.float32)
    facts = {name: init[name] for name in ("architecture", "method", "data") if init.get(name) is not None}
    facts |= {} if cut is None else {"truncated": cut.record()}
    config, tensors = plain_adapter(now, factors, dtype, base)
    config["revision"] = revision
    tensors |= other_tensors(now, start, dtype)
    facts |= write_plain(out, "export", config, tensors, facts, overwrite=overwrite)
    if facts["holds"]:
        warnings.warn(
            f"{out} is not a plain LoRA: it also holds {described(facts['holds'])}; {NOT_SERVED}", AdapterWarning, stacklevel=2
        )
    return Path(out)


B_BIAS = ".lora_B.bias"
NOT_SERVED = "PEFT loads them, servers such as vLLM and llama.cpp do not"
WHOLE = "whole tensors"
# Part of a tensor's name → what it is.
KINDS = {
    "lora_magnitude_vector": "DoRA magnitudes",
    "lora_B.bias": "biases of B",
    "trainable_tokens": "trained tokens",
}


def contents(tensors: Iterable[str]) -> dict[str, list[str]]:
    """What an adapter's file holds beside A and B: kind → names of layers or tensors in the base model."""
    held: dict[str, list[str]] = {}
    for key in tensors:
        if not key.endswith((A_WEIGHT, B_WEIGHT)):
            kind = next((kind for part, kind in KINDS.items() if part in key), WHOLE)
            name = layer_of(key) or key.removeprefix(PREFIX).removesuffix(".token_adapter.trainable_tokens_delta")
            held.setdefault(kind, []).append(name)
    return held


def described(holds: Mapping[str, list[str]]) -> str:
    """The same in words."""
    return " and ".join(
        f"{kind} ({', '.join(map(repr, names[:3]))}{f' and {len(names) - 3} more' if len(names) > 3 else ''})"
        for kind, names in holds.items()
    )


def vllm_rank(rank: int) -> int | None:
    """The smallest `--max-lora-rank` with which vLLM serves an adapter of this rank; None if there is none."""
    return next((limit for limit in VLLM_RANKS if limit >= rank), None)


def _factors(adapter: Adapter, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, d_in) and B (d_out, r), float64, as they are in the file."""
    a, b = (adapter.tensors[f"{PREFIX}{place.path}{part}"] for part in (A_WEIGHT, B_WEIGHT))
    return place.of_a(a).double(), place.of_b(b).double()


def _plain_factors(now: Adapter, start: Adapter, layer: str, place: Place) -> LowRank:
    """A and B in float64 whose product is to be added to the untouched weight."""
    (a, b), (a0, b0) = _factors(now, place), _factors(start, place)
    scaling = scaling_of(now.config, layer, len(a))
    if torch.equal(a, a0):
        return LowRank(a, scaling * (b - b0))
    if is_zero(a0, b0):
        return LowRank(a, scaling * b)
    if torch.equal(b, b0):
        return LowRank(a - a0, scaling * b)
    return LowRank(torch.cat([a, a0]), scaling * torch.cat([b, -b0], dim=1))


def plain_adapter(
    like: Adapter, factors: Mapping[str, LowRank], dtype: torch.dtype, base: str | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of a LoRA for an untouched base, with α = r and without patterns: its scaling is 1 everywhere.

    Args:
        like: an adapter, whose other settings are kept.
        factors: layer → A and B, whose product is added to the weight. They are padded with zeros to the largest rank. Those of
            all experts of a parameter are put into one A and one B, as PEFT has them.
        dtype: of the tensors.
        base: name of the base.

    Raises:
        ValueError: naming the layer, for values beyond the range of the dtype.
    """
    rank = max(len(a) for a, _ in factors.values())
    config = dict(
        like.config,
        base_model_name_or_path=base,
        init_lora_weights=True,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
    )
    tensors = {}
    for path, layers in layout_of(factors).items():
        parts = []
        for layer in layers:
            a, b = (factor.to(dtype) for factor in factors[layer])
            if not bool(a.isfinite().all() and b.isfinite().all()):
                raise InputError(f"{like.path}: B of {layer!r} times its scaling is beyond the range of {dtype}")
            missing = rank - len(a)
            parts.append((torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))))
        tensors[f"{PREFIX}{path}{A_WEIGHT}"], tensors[f"{PREFIX}{path}{B_WEIGHT}"] = stacked(parts)
    return config, tensors


def other_tensors(now: Adapter, start: Adapter, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What an adapter holds beside A and B; of biases of B, what training has added, times the scaling, in `dtype`."""
    tensors = {key: tensor for key, tensor in now.tensors.items() if not key.endswith((A_WEIGHT, B_WEIGHT, B_BIAS))}
    for key in (key for key in now.tensors if key.endswith(B_BIAS)):
        layer = layer_of(key)
        change = now.tensors[key].double() - start.tensors[key].double()
        rank = len(now.tensors[f"{PREFIX}{layer}{A_WEIGHT}"])
        tensors[key] = (scaling_of(now.config, layer, rank) * change).to(dtype)
    return tensors


def write_plain(
    out: str | os.PathLike[str],
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
    *,
    overwrite: bool,
) -> dict[str, Any]:
    """Write the directory of an adapter for an untouched base, with its card and record: whole or not at all, once a group.

    Args:
        out: the directory.
        kind: one of `PLAIN`.
        config, tensors: of the adapter.
        facts: for card and record.
        overwrite: replace an earlier directory of ours.

    Returns:
        The facts with those of the adapter: `model`, `rank`, `alpha`, `max_lora_rank`, `holds` and `experts`.

    Raises:
        FileExistsError, OSError: of `new_directory`.
    """
    config = for_untouched(config)
    base, alpha = config["base_model_name_or_path"], config["lora_alpha"]
    rows = {layer_of(key): len(t) for key, t in tensors.items() if key.endswith(A_WEIGHT)}
    layers = places(config, rows, "the adapter")
    rank = max(rows[place.path] // place.experts for place in layers.values())
    own = {"model": base, "rank": rank, "alpha": alpha, "max_lora_rank": vllm_rank(rank), "holds": contents(tensors)}
    own["experts"] = sum(place.number is not None for place in layers.values())
    facts = {**facts, **own}

    def write() -> None:
        with store.new_directory(out, overwrite=overwrite) as part:
            (part / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            records.write_tensors(part / ADAPTER_WEIGHTS, tensors)
            write_card(part, kind, facts, base)
            records.write_manifest(part, kind, facts, files=(ADAPTER_WEIGHTS,))

    written_once(out, write)
    return facts


def is_zero(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether B A is zero up to rounding: B = 0, or the rows of B and the columns of A are orthogonal."""
    product = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()  # ‖BA‖² = tr(BᵀB AAᵀ): r × r matrices
    return bool(product <= ORTHOGONAL * torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b))


def original_base(start: Adapter, untouched: bool) -> str:
    """The name of the untouched base, from the initial adapter and the files around it."""
    init, named = init_around(start.path), start.config.get("base_model_name_or_path")
    recorded_name = recorded(start.config, start.path).get("model")
    if init is not None or recorded_name:
        name = (init or {}).get("model") or recorded_name
    elif untouched:
        name = named
    else:
        name = (mark_of(Path(named)) or {}).get("model") if named and os.path.isdir(named) else None
    if not name:
        raise InputError(
            f"the untouched base that {start.path} was made of is not known by name: give it with base= "
            "(on the command line --base), a hub name or a folder"
        )
    return name


def _check_base(base: ModelSource, start: Adapter, now: Adapter) -> None:
    """Raise `ValueError` for an untouched base that differs from the one that the adapter was trained on."""
    if os.path.isdir(base) and is_residual(Path(base)):
        raise InputError(f"{base} is a residual base, and an export is for the untouched model: name that one")
    folder, known = local_folder(base), recorded(start.config, start.path).get("base")
    if folder is not None and known and has_recorded_weights(folder, known) is False:
        raise OtherModelError(
            f"{base} is not the model that {start.path} was made of: it has other weights. Export for that one (base=, on the "
            "command line --base)"
        )
    residual = start.path.parent / "base"
    if init_around(start.path) is None or not residual.is_dir():
        return
    differences = what_differs(residual, base, adapted=places_in(start), saved=contents(now.tensors).get(WHOLE, []))
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise OtherModelError(
            f"{base} is not the model that {start.path} was made of: {'; '.join(differences[:3])}{more}. Save the model as "
            "it was before it got its adapters, and export for that folder (base=, on the command line --base)"
        )


def check_pair(now: Adapter, start: Adapter, *, stacklevel: int) -> None:
    """Raise `ValueError`, naming both, if settings, tensors or records (`check_origin`, which warns too) do not belong together."""
    for name in ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern"):
        if (now.config.get(name) or None) != (start.config.get(name) or None):
            raise OtherModelError(
                f"{now.path} and {start.path} do not belong together: {name} is {now.config.get(name)} and {start.config.get(name)}"
            )
    for key, value in start.tensors.items():
        trained = now.tensors.get(key)
        if ".lora_" in key and (trained is None or trained.shape != value.shape):
            what = "is missing" if trained is None else f"has shape {tuple(trained.shape)}, not {tuple(value.shape)}"
            raise OtherModelError(f"{now.path} and {start.path} do not belong together: {key} {what} in the trained adapter")
    extra = next((key for key in now.tensors if ".lora_" in key and key not in start.tensors), None)
    if extra is not None:
        raise OtherModelError(f"{now.path} and {start.path} do not belong together: {extra} is not in the initial adapter")
    a, b = ({layer_of(key) for key in now.tensors if key.endswith(part)} for part in (A_WEIGHT, B_WEIGHT))
    if not a or a != b:
        alone = f": {min(a ^ b)!r} has only one of them" if a ^ b else ""
        raise InputError(f"{now.path / ADAPTER_WEIGHTS} has no pairs of A and B of linear layers{alone}")
    check_origin(now, start, stacklevel=stacklevel + 1)
