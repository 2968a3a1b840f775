"""`export_lora`: after training, a plain LoRA for the untouched base."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

import torch
from peft import PeftModel

from nullspace import store
from nullspace.integrations.peft.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, read_adapter, save_adapter

# ‖B A‖ over ‖B‖ ‖A‖, below which an adapter that starts so has left its base alone.
ORTHOGONAL = 1e-6


def export_lora(
    trained: PeftModel | str | os.PathLike[str],
    initial: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> Path:
    """After training: a plain LoRA for the *untouched* base model, which does what the trained adapter does on the residual one.

    With W₀ = W_res + s·B₀A₀, the trained model is W_res + s·BA = W₀ + s·(BA − B₀A₀). Where A was frozen that is s·(B − B₀)A₀, of
    rank r; otherwise [B, −B₀][A; A₀], of rank 2r with α doubled (× √2 with rsLoRA), so that the scaling stays s.

    Args:
        trained: the trained model, or the directory of its adapter.
        initial: the directory of the adapter as `inject_adapters` made it (`OUT/adapter` of `nullspace init`).
        out: directory of the new adapter; written whole or not at all.
        base: name or path of the untouched base, written into the adapter's configuration.
        overwrite: replace an earlier export.

    Returns:
        The path of `out`.

    Raises:
        FileNotFoundError: if an adapter file is missing.
        ValueError: naming the file, if it is damaged, the two adapters do not belong together, or they have DoRA's magnitudes
            and a residual base, for which there is no LoRA on the untouched one.
        FileExistsError: if `out` is in the way.
    """
    store.check_free(out, overwrite=overwrite)
    if isinstance(trained, PeftModel):
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(trained, trained.active_adapter, Path(folder))
            return export_lora(folder, initial, out, base=base, overwrite=overwrite)
    now, start = read_adapter(Path(trained)), read_adapter(Path(initial))
    _check_pair(now, start)
    pairs = [key.removesuffix(".lora_A.weight") for key in now.tensors if key.endswith(".lora_A.weight")]
    frozen = all(torch.equal(now.tensors[f"{p}.lora_A.weight"], start.tensors[f"{p}.lora_A.weight"]) for p in pairs)
    untouched = all(_is_zero(start.tensors[f"{p}.lora_B.weight"], start.tensors[f"{p}.lora_A.weight"]) for p in pairs)
    if now.config.get("use_dora") and not untouched:
        raise ValueError(
            f"{now.path} uses DoRA on a residual base: its magnitudes scale the sum of both, which no LoRA on the untouched base "
            "does; serve it on the residual base, or merge it there (merge_and_unload)"
        )
    tensors = dict(now.tensors)
    for p in pairs:
        key_a, key_b = f"{p}.lora_A.weight", f"{p}.lora_B.weight"
        a, b, a0, b0 = now.tensors[key_a], now.tensors[key_b], start.tensors[key_a], start.tensors[key_b]
        if frozen:
            tensors[key_b] = (b.double() - b0.double()).to(b.dtype)
        elif not untouched:
            tensors[key_a], tensors[key_b] = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
    config = dict(now.config, base_model_name_or_path=base, init_lora_weights=True, inference_mode=True)
    if not (frozen or untouched):
        alpha_factor = math.sqrt(2) if config.get("use_rslora") else 2
        config["r"] = 2 * config["r"]
        config["lora_alpha"] = alpha_factor * config["lora_alpha"]
        config["rank_pattern"] = {k: 2 * v for k, v in (config.get("rank_pattern") or {}).items()}
        config["alpha_pattern"] = {k: alpha_factor * v for k, v in (config.get("alpha_pattern") or {}).items()}
    with store.new_directory(out, overwrite=overwrite) as part:
        (part / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        store.write_tensors(part / ADAPTER_WEIGHTS, tensors)
        store.write_manifest(part, "export", {"rank_factor": 1 if frozen or untouched else 2}, files=(ADAPTER_WEIGHTS,))
    return Path(out)


def _is_zero(b: torch.Tensor, a: torch.Tensor) -> bool:
    """Whether B A is nothing but rounding: B = 0, or the rows of B and the columns of A are orthogonal."""
    norms = [torch.linalg.matrix_norm(t.double()) for t in (b, a, b.double() @ a.double())]
    return bool(norms[2] <= ORTHOGONAL * norms[0] * norms[1])


def _check_pair(now: Adapter, start: Adapter) -> None:
    for name in ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern"):
        if (now.config.get(name) or None) != (start.config.get(name) or None):
            raise ValueError(
                f"{now.path} and {start.path} do not belong together: {name} is {now.config.get(name)} and {start.config.get(name)}"
            )
    for key, value in start.tensors.items():
        found = now.tensors.get(key)
        if ".lora_" in key and (found is None or found.shape != value.shape):
            what = "is missing" if found is None else f"has shape {tuple(found.shape)}, not {tuple(value.shape)}"
            raise ValueError(f"{now.path} and {start.path} do not belong together: {key} {what} in the trained adapter")
    extra = next((key for key in now.tensors if ".lora_" in key and key not in start.tensors), None)
    if extra is not None:
        raise ValueError(f"{now.path} and {start.path} do not belong together: {extra} is not in the initial adapter")
