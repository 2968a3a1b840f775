"""What `nullspace plan` says of seven published models on six cards, from their configurations.

    python -m benchmarks.plans     # writes benchmarks/results/plans.json, and prints the tables of docs/large-models.md

256 sequences of 1024 tokens of text in batches of 4, rank 128, 16-bit weights, a host with 128 GB and 16 cores. Nothing is run.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers

from benchmarks import shapes
from benchmarks.environment import RESULTS, write_result
from benchmarks.holding_tables import markdown

ON = ("T4", "L4", "RTX 4090", "L40S", "A100-80GB", "H100")
"""Names in `nullspace.planning.cards`."""
HOST, THREADS = 128, 16
FORMS = ("bfloat16", "4-bit")
"""Of the weights while the adapter is trained."""


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
    "Llama-3.2-1B": (functools.partial(shapes.config, "Llama-3.2-1B"), "LlamaForCausalLM", shapes.PARAMETERS["Llama-3.2-1B"]),
    "Gemma-3-4b": (_gemma3, "Gemma3ForConditionalGeneration", 4_300_079_472),
    "Llama-3-8B": (functools.partial(shapes.config, "Llama-3-8B"), "LlamaForCausalLM", shapes.PARAMETERS["Llama-3-8B"]),
    "Qwen2.5-VL-7B": (_qwen2_5_vl, "Qwen2_5_VLForConditionalGeneration", 8_292_166_656),
    "gpt-oss-20b": (_gpt_oss, "GptOssForCausalLM", 20_914_757_184),
    "Qwen3-30B-A3B": (_qwen3_moe, "Qwen3MoeForCausalLM", 30_532_122_624),
    "Llama-3-70B": (functools.partial(shapes.config, "Llama-3-70B"), "LlamaForCausalLM", shapes.PARAMETERS["Llama-3-70B"]),
}
"""Name → configuration, class, and the parameters of the published weights."""


def empty(name: str) -> Any:
    """A model on the meta device."""
    config, kind, published = MODELS[name]
    with torch.device("meta"):
        model = getattr(transformers, kind)._from_config(config(), dtype=torch.bfloat16).eval()
    parameters = sum({id(p): p.numel() for p in model.parameters()}.values())
    if parameters != published:
        raise ValueError(f"{name} has {parameters} parameters here, and its published weights {published}")
    return model


def plans(name: str) -> Iterator[dict[str, Any]]:
    """What is said of a model, a record for each card of `ON`."""
    from nullspace.model.coverage import covered_share
    from nullspace.model.sites import find_targets
    from nullspace.planning.answer import answer, is_typed
    from nullspace.planning.cards import CARDS
    from nullspace.planning.forecast import is_pooled, survey_of
    from nullspace.planning.plan import Rates, Workload

    model = empty(name)
    targets, surveys, says = find_targets(model, rank=128), {}, {}
    for card in ON:
        memory = CARDS[card].memory
        workload = Workload(targets=targets, rates=Rates.of("cuda", torch.bfloat16, card=CARDS[card]))
        workload = replace(workload, experts="pooled" if is_pooled(targets, workload, free=memory) else "each")
        if workload.experts not in surveys:
            surveys[workload.experts] = survey_of(model, workload)
        survey = surveys[workload.experts]
        says[card] = (
            workload.experts,
            answer(model, targets, workload, survey, device_memory=memory, host_memory=HOST * 1e9, usable=is_typed),
        )
    share, survey = covered_share(model, survey.reached), next(iter(surveys.values()))
    trained = list(trainings(model, targets, survey, Workload(targets=targets)))
    for card, (experts, said) in says.items():
        chosen = said.chosen or next((offer.plan for offer in said.offers), None)
        yield {
            "model": name,
            "gpu": card,
            "experts": experts,
            "covered_share": share,
            "tracked": survey.tracked,
            "fits": said.chosen is not None,
            "missing": said.missing,
            "plan": None if chosen is None else chosen.as_dict(),
            "training": [
                {**form, "checkpointing": each.checkpointing, "bytes": each.bytes, "fits": each.fits(CARDS[card].memory)}
                for form, each in trained
            ],
        }


def trainings(model: Any, targets: Any, survey: Any, workload: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Memory for training with weights of 16 and of 4 bits, A and B or B alone, without and with checkpointing.

    The model is left with weights of 4 bits.
    """
    from nullspace.integrations.transformers.quantisation import set_planned_bytes
    from nullspace.planning.training import training

    for weights in FORMS:
        if weights == "4-bit":
            set_planned_bytes(model, model.config, load_in_4bit=True)
        for freeze_a in (False, True):
            for each in training(model, targets, survey, workload, freeze_a=freeze_a):
                yield {"weights": weights, "freeze_a": freeze_a}, each


def _calibration(record: Mapping[str, Any]) -> str:
    """A cell: how, the GPU's memory, and the estimated time."""
    from nullspace.planning.units import duration, gigabytes

    plan = record["plan"]
    if plan is None:
        return "no"
    words = [plan["strategy"]] + ["offload"] * (plan["weights"] == "disk") + ["solved on the host"] * plan["solved_on_host"]
    small = [] if plan["batch_size"] == 4 else [f"batches of {plan['batch_size']}"]
    return f"{', '.join(words + small)}: {gigabytes(plan['device_bytes'])}, {duration(plan['total_seconds'])}"


def _training(record: Mapping[str, Any]) -> str:
    """A cell: the first form that fits, or the least memory that a form takes."""
    from nullspace.planning.units import gigabytes

    both = [each for each in record["training"] if not each["freeze_a"]]
    fitting = next((each for each in both if each["fits"]), None)
    if fitting is None:
        return f"no ({gigabytes(min(each['bytes'] for each in both))})"
    return f"{fitting['weights']}{', checkpointing' if fitting['checkpointing'] else ''}: {gigabytes(fitting['bytes'])}"


def _memory(record: Mapping[str, Any]) -> Iterator[str]:
    """Cells: the training's memory in each form of the weights, without and with checkpointing; A and B, B alone."""
    from nullspace.planning.units import gigabytes

    for weights in FORMS:
        for checkpointing in (False, True):
            form = {"weights": weights, "checkpointing": checkpointing}
            same = [each for each in record["training"] if form.items() <= each.items()]
            both, alone = (gigabytes(each["bytes"]) for each in sorted(same, key=lambda each: each["freeze_a"]))
            yield f"{both}, {alone}"


def tables(records: list[Mapping[str, Any]]) -> list[str]:
    """The records as tables in Markdown, a row a model.

    Of the calibration and of the training with a column a card; of the training's memory with a column a form of it.
    """
    known = {(record["model"], record["gpu"]): record for record in records}
    made = []
    for cell in (_calibration, _training):
        made.append([["model", *ON], *([name, *(cell(known[name, card]) for card in ON)] for name in MODELS)])
    forms = [f"{weights}{more}" for weights in FORMS for more in ("", ", checkpointing")]
    sizes = {name: f"{published / 1e9:.1f} billion" for name, (_, _, published) in MODELS.items()}
    made.append([["model", "parameters", *forms], *([name, sizes[name], *_memory(known[name, ON[0]])] for name in MODELS)])
    return [markdown(rows) for rows in made]


def read() -> list[Mapping[str, Any]]:
    """The records of the committed result."""
    records: list[Mapping[str, Any]] = json.loads((RESULTS / "plans.json").read_text())["plans"]
    return records


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(THREADS)
    records = [record for name in MODELS for record in plans(name)]
    path = write_result("plans", {"plans": records})
    print("\n\n".join(tables(records)))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
