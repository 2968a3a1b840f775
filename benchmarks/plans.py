"""What `nullspace plan` says of published mixtures of experts and vision-language models, from their configurations.

    python -m benchmarks.plans     # writes benchmarks/results/plans.json, and prints the table of docs/large-models.md

256 sequences of 1024 tokens of text in batches of 4, rank 128, bfloat16, a host with 256 GB, GPUs with 24, 48 and 80 GB.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers

from benchmarks.environment import RESULTS, write_result

MEMORIES = (24, 48, 80)
HOST = 256


def _qwen3_moe() -> Any:
    return transformers.Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        vocab_size=151936,
        max_position_embeddings=40960,
    )


def _gpt_oss() -> Any:
    return transformers.GptOssConfig(
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        vocab_size=201088,
    )


def _mixtral() -> Any:
    return transformers.MixtralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=32000,
        max_position_embeddings=32768,
    )


def _gemma3() -> Any:
    text = transformers.Gemma3TextConfig(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=262208,
        sliding_window=1024,
        max_position_embeddings=131072,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=896,
        patch_size=14,
        vision_use_head=False,
    )
    return transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=256)


def _qwen2_5_vl() -> Any:
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)


MODELS: dict[str, tuple[Any, str, int]] = {
    "Qwen3-30B-A3B": (_qwen3_moe, "Qwen3MoeForCausalLM", 30_532_122_624),
    "gpt-oss-20b": (_gpt_oss, "GptOssForCausalLM", 20_914_757_184),
    "Mixtral-8x7B": (_mixtral, "MixtralForCausalLM", 46_702_792_704),
    "Gemma-3-4b": (_gemma3, "Gemma3ForConditionalGeneration", 4_300_079_472),
    "Qwen2.5-VL-7B": (_qwen2_5_vl, "Qwen2_5_VLForConditionalGeneration", 8_292_166_656),
}
"""Name → configuration, class, and the parameters of the published weights."""


def empty(name: str) -> Any:
    """A model on the meta device."""
    config, kind, _ = MODELS[name]
    with torch.device("meta"):
        return getattr(transformers, kind)._from_config(config(), dtype=torch.bfloat16).eval()


def plan(name: str, memory: int) -> dict[str, Any]:
    """The fastest plan that fits a GPU of this many GB, as a record; with what is missing, if none does."""
    from nullspace.model.coverage import covered_share
    from nullspace.model.sites import find_targets
    from nullspace.planning.choice import fit
    from nullspace.planning.forecast import is_pooled, survey_of
    from nullspace.planning.plan import Workload

    model, published = empty(name), MODELS[name][2]
    parameters = sum({id(p): p.numel() for p in model.parameters()}.values())
    if parameters != published:
        raise ValueError(f"{name} has {parameters} parameters here, and its published weights {published}")
    targets = find_targets(model, rank=128)
    workload = Workload(targets=targets)
    pooled = is_pooled(targets, workload, free=memory * 1e9)
    workload = replace(workload, experts="pooled" if pooled else "each")
    survey = survey_of(model, workload)
    record = {
        "model": name,
        "parameters": parameters,
        "memory_gb": memory,
        "covered_share": covered_share(model, survey.reached),
        "experts": workload.experts,
        "sites": len(survey.sites),
        "tracked": survey.tracked,
    }
    try:
        chosen = fit(model, workload, device_memory=memory * 1e9, host_memory=HOST * 1e9)
    except MemoryError as error:
        return {**record, "missing": str(error)}
    return {**record, **chosen.as_dict()}


def table(records: list[Mapping[str, Any]]) -> str:
    """The records as a table in Markdown."""
    from nullspace.planning.units import duration, gigabytes

    rows = [
        [
            "model",
            "GPU",
            "strategy",
            "weights on",
            "GPU memory",
            "of which sums",
            "host memory",
            "estimated time",
            "of which eigenproblems",
        ]
    ]
    for record in records:
        if "missing" in record:
            rows.append([record["model"], f"{record['memory_gb']} GB", "does not fit", *[""] * 6])
            continue
        device, host = (sum(record[part].values()) for part in ("device_parts", "host_parts"))
        rows.append(
            [
                record["model"],
                f"{record['memory_gb']} GB",
                record["strategy"],
                record["weights"],
                gigabytes(device),
                gigabytes(record["device_parts"].get("sums", 0)),
                gigabytes(host),
                duration(record["total_seconds"]),
                duration(record["seconds"]["decomposition"]),
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def read() -> list[Mapping[str, Any]]:
    """The records of the committed result."""
    records: list[Mapping[str, Any]] = json.loads((RESULTS / "plans.json").read_text())["plans"]
    return records


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    records = [plan(name, memory) for name in MODELS for memory in MEMORIES]
    path = write_result("plans", {"plans": records})
    print(table(records))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
