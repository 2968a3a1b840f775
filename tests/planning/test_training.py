"""Memory for training against PEFT's own models: what autograd saves, what AdamW holds, and the peak of a whole step."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import transformers
from mixtures import mixture
from peft import LoraConfig, get_peft_model
from torch import nn

from nullspace.integrations.transformers.quantisation import set_planned_bytes
from nullspace.model.sites import find_targets
from nullspace.planning.meta_run import LiveBytes
from nullspace.planning.plan import MARGIN, Workload
from nullspace.planning.survey import Survey
from nullspace.planning.training import Training, training

RANK = 8
BATCH, LENGTH = 2, 48
WORK = Workload(samples=2, length=LENGTH, batch_size=BATCH, rank=RANK)


def llama(vocabulary: int = 211, blocks: int = 3, **more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM._from_config(config, **more).train()


def forecast(model: nn.Module, **more: Any) -> dict[bool, Training]:
    """Checkpointing → memory."""
    survey = Survey(model, batch_size=BATCH, length=LENGTH)
    made = training(model, find_targets(model, rank=RANK), survey, WORK, **more)
    assert all(each.counted for each in made)
    return {each.checkpointing: each for each in made}


def saved_by_peft(adapted: Any, autocast: bool) -> int:
    """Bytes of the tensors that autograd saves, but for parameters and buffers, up to the last norm."""
    weights = {t.untyped_storage().data_ptr() for t in (*adapted.parameters(), *adapted.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    adapted.enable_input_require_grads()
    ids = torch.randint(0, 90, (BATCH, LENGTH))
    context = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        adapted.base_model.model.model(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("frozen", ["", "A", "B"], ids=["both", "b-alone", "a-alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_what_autograd_saves(dtype: torch.dtype, frozen: str) -> None:
    model = llama(dtype=dtype)
    known = forecast(model, freeze_a=frozen == "A", freeze_b=frozen == "B")[False].parts
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not (frozen and f"lora_{frozen}" in name))
    assert known["activations"] == saved_by_peft(adapted, autocast=dtype == torch.bfloat16)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert known["gradients"] == sum(p.nbytes for p in trained)
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert known["optimizer"] == sum(t.nbytes for t in moments)
    assert known["adapter"] == sum(p.nbytes for name, p in adapted.named_parameters() if "lora_" in name)


def test_activations_of_a_mixture_of_experts() -> None:
    model = mixture("qwen3_moe").train()
    known = forecast(model)[False].parts
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules=attention, target_parameters=experts))
    # PEFT 0.20 forms BA of all experts beside their sum with the weights; then more is kept.
    assert known["activations"] <= 1.001 * saved_by_peft(adapted, autocast=False)
    assert known["activations"] >= 0.6 * saved_by_peft(adapted, autocast=False)
    assert known["adapter"] == sum(p.nbytes for name, p in adapted.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(("vocabulary", "blocks"), [(211, 6), (4000, 2)], ids=["blocks", "loss"])
def test_the_peak_of_a_step_is_made_of_these_parts(vocabulary: int, blocks: int, again: bool) -> None:
    with torch.device("meta"):
        model = llama(vocabulary, blocks, attn_implementation="eager")
        known = forecast(model)[again].parts
        adapted: Any = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    if again:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.enable_input_require_grads()
    live = LiveBytes()
    for tensor in (*adapted.parameters(), *adapted.buffers()):
        live.ignore(tensor)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long, device="meta")
    with live:
        output = adapted(input_ids=ids, labels=ids, use_cache=False)  # held, with its logits, as by a loop that logs them
        output.loss.backward()
    assert known["activations"] + known["loss or block"] == pytest.approx(live.peak, rel=0.03)


def test_weights_of_four_bits() -> None:
    with torch.device("meta"):
        model = llama(dtype=torch.bfloat16)
    whole = forecast(model)
    set_planned_bytes(model, model.config, load_in_4bit=True)
    packed = forecast(model)
    linear = [m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    bits = 4 + 32 / 64  # a scale for 64 values
    saving = sum(linear) * (2 - bits / 8) - 2 * max(linear)
    assert whole[True].parts["weights"] - packed[True].parts["weights"] == pytest.approx(saving, abs=len(linear))
    assert {**whole[True].parts, "weights": 0} == {**packed[True].parts, "weights": 0}
    assert whole[True].bytes < whole[False].bytes
    assert whole[True].fits(None)
    assert whole[True].fits(whole[True].bytes / MARGIN + 1)
    assert not whole[True].fits(whole[True].bytes / MARGIN - 1)


def test_what_cannot_be_counted_is_estimated() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)[: int(x.sum())])

    model = Router()
    survey = Survey(model, batch=torch.zeros(4, 16))
    made = training(model, find_targets(model), survey, Workload(samples=4, length=1, batch_size=4, rank=4))
    assert not any(each.counted for each in made)
    assert all(each.parts["activations"] > 0 for each in made)
