"""Every method of `inject_adapters`, and what else takes a model or an adapter, on a simulated GPU: all of it stays there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import covariances_for, sources_for
from guarded import CONFIG, trained, trainer_of, word_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, EvaConfig

pytest.importorskip("simulated.runtime", exc_type=ImportError)

from simulated.references import batches_of, sums_of

from models import tiny
from nullspace import Covariances, compute_covariances, compute_null_spaces, gradient_covariances
from nullspace.integrations.peft import (
    ForgettingCallback,
    Gauge,
    clora,
    confine,
    decay_to_start,
    drift_of,
    export_lora,
    filter_adapter,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    inject_adapters,
    lora_layers,
    oplora,
    penalty,
    preprocess_corda,
    save_init,
)
from nullspace.methods import METHODS
from nullspace.moments.precision import PRECISIONS

CUDA = torch.device("cuda", 0)
BATCH = batches_of("right")[0]


def on_device(model: torch.nn.Module) -> None:
    """All of a model is on the GPU."""
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {CUDA}


def logits(model: torch.nn.Module, device: torch.device | str = CUDA) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**{name: value.to(device) for name, value in BATCH.items()}).logits.cpu()


@pytest.fixture(scope="module")
def of_base() -> torch.Tensor:
    return logits(tiny("llama"), "cpu")


@pytest.fixture(scope="module")
def sources() -> dict[str, dict[str, Any]]:
    """What each method needs, computed on the CPU."""
    return {method: sources_for(method, "llama") for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, sources: dict[str, dict[str, Any]], of_base: torch.Tensor, gpu: Any) -> None:
    model = inject_adapters(tiny("llama").to(CUDA), LoraConfig(**CONFIG), method=method, **sources[method])
    on_device(model)
    assert (logits(model) - of_base).norm() <= 1e-5 * of_base.norm()


@pytest.mark.parametrize("method", [method for method, each in METHODS.items() if each.needs])
def test_methods_from_what_the_device_computed(method: str, of_base: torch.Tensor, gpu: Any, tmp_path: Path) -> None:
    model = tiny("llama").to(CUDA)
    given: dict[str, Any] = {}
    if "spaces" in METHODS[method].needs:
        given["spaces"] = compute_null_spaces(model, batches_of("left"), rank=8, progress=False)
    for number, name in enumerate(set(METHODS[method].needs) - {"spaces"}):
        given[name] = compute_covariances(model, batches_of("left"), tmp_path / str(number), precision="fp64", progress=False)
    model = inject_adapters(model, LoraConfig(**CONFIG), method=method, **given)
    on_device(model)
    assert (logits(model) - of_base).norm() <= 1e-5 * of_base.norm()


# ------------------------------------------------------------------------------------------------ doors


def adapted(**options: Any) -> PeftModel:
    """A LoRA on a model of the GPU that has been trained a little."""
    model = get_peft_model(tiny("llama").to(CUDA), LoraConfig(**{**CONFIG, **options}))
    with torch.no_grad():
        for layer in lora_layers(model, "default").values():
            layer.lora_B["default"].weight.normal_(0, 0.02)
    return model


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_preprocess_corda(mode: str, of_base: torch.Tensor, gpu: Any) -> None:
    model = tiny("llama").to(CUDA)
    config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode), **CONFIG)

    def run_model() -> None:
        with torch.no_grad():
            for batch in batches_of():
                model(**{name: value.to(CUDA) for name, value in batch.items()})

    preprocess_corda(model, config, run_model)
    model = get_peft_model(model, config)
    on_device(model)
    assert (logits(model) - of_base).norm() <= 1e-4 * of_base.norm()


def test_eva(gpu: Any) -> None:
    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), **CONFIG)
    loader = [{name: value.to(CUDA) for name, value in batch.items()} for batch in batches_of("right")]
    found = get_eva_state_dict(tiny("llama").to(CUDA), loader, config, show_progress_bar=False)
    assert {a.device for a in found.values()} == {CUDA}
    model = get_peft_model(tiny("llama").to(CUDA), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    on_device(model)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_compute_covariances(precision: str, gpu: Any, tmp_path: Path) -> None:
    found = compute_covariances(tiny("llama").to(CUDA), batches_of("left"), tmp_path / "c", precision=precision, progress=False)
    again = Covariances.load(tmp_path / "c")
    for name, (matrix, tokens) in sums_of("llama", "left").items():
        assert again[name].tokens == found[name].tokens == tokens
        assert (again[name].matrix().cpu() - matrix).norm() <= 1e-5 * matrix.norm()


def test_a_checkpoint_continues(gpu: Any, tmp_path: Path) -> None:
    model = tiny("llama").to(CUDA)

    def run() -> Any:
        return compute_null_spaces(model, batches_of(), rank=4, strategy="layerwise", checkpoint=tmp_path / "c", progress=False)

    first, again = run(), run()
    assert all(torch.equal(first[name].basis.cpu(), again[name].basis.cpu()) for name in first)


def test_gradient_covariances(gpu: Any) -> None:
    loader = [{**batch, "labels": batch["input_ids"].clone()} for batch in batches_of("right")]
    expected = gradient_covariances(tiny("llama"), loader, progress=False)
    model = tiny("llama").to(CUDA)
    found = gradient_covariances(model, loader, progress=False)
    on_device(model)
    for name in expected:
        matrix = expected[name].matrix()
        assert (found[name].matrix().cpu() - matrix).norm() <= 1e-4 * matrix.norm()


@pytest.mark.parametrize(("directions", "damping"), [("spaces", None), ("covariances", None), ("covariances", 1.0)])
def test_confine(directions: str, damping: float | None, sources: dict[str, dict[str, Any]], gpu: Any) -> None:
    model = adapted()
    given = sources["lora-null"]["spaces"] if directions == "spaces" else covariances_for("llama")
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.0)
    options = {} if damping is None else {"damping": damping}
    with confine(model, given, 0.3, optimizer=optimizer, **options):
        decay_to_start(model, 0.1, optimizer)
        step_on(model, optimizer)
    on_device(model)


@pytest.mark.parametrize("of", ["weights", "moments"])
def test_oplora(of: str, gpu: Any) -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    oplora(model, 5, covariances_for("llama") if of == "moments" else None, optimizer=optimizer)
    step_on(model, optimizer)
    on_device(model)


def test_drift_penalty_and_gauge(gpu: Any) -> None:
    model, covariances = adapted(), covariances_for("llama")
    assert drift_of(model, covariances).median > 0
    assert Gauge(model, covariances)().worst > 0
    holds = [penalty(model, covariances), clora(model, 5, covariances), clora(model, 5)]
    assert all(hold().device == CUDA for hold in holds)
    sum(hold() for hold in holds).backward()
    assert all(parameter.grad is not None and parameter.grad.device == CUDA for parameter in trained(model))


def test_filter_adapter(gpu: Any, tmp_path: Path) -> None:
    model, task, keep = adapted(), covariances_for("llama", seed=3), covariances_for("llama")
    before = drift_of(model, keep)
    filter_adapter(model, task, keep, strength=3.0, progress=False)
    on_device(model)
    assert drift_of(model, keep).median < before.median
    model.save_pretrained(tmp_path / "a")
    filter_adapter(tmp_path / "a", task, keep, tmp_path / "b", strength=1.0, base=tiny("llama").to(CUDA), progress=False)


def test_forgetting_callback(gpu: Any, tmp_path: Path) -> None:
    gpu.devices = 1  # with more, the Trainer replicates the model
    model = adapted()
    callback = ForgettingCallback(covariances_for("llama"), texts=["w3 w9 w4", "w8 w8"], tokenizer=word_tokenizer())
    trainer = trainer_of(model, tmp_path, use_cpu=False, max_steps=2)
    callback.attach(trainer)
    trainer.train()
    assert len(callback.readings) == 2
    assert callback.readings[-1].kl > 0
    on_device(model)


def test_export(gpu: Any, tmp_path: Path, sources: dict[str, dict[str, Any]], of_base: torch.Tensor) -> None:
    model = inject_adapters(tiny("llama").to(CUDA), LoraConfig(**CONFIG), method="lora-null", **sources["lora-null"])
    save_init(tmp_path / "init", model)
    model.save_pretrained(tmp_path / "trained")
    export_lora(tmp_path / "trained", tmp_path / "init", tmp_path / "out", base="tiny")
    plain = PeftModel.from_pretrained(tiny("llama"), tmp_path / "out").to(CUDA)
    assert (logits(plain) - of_base).norm() <= 1e-5 * of_base.norm()


def step_on(model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Two steps on tokens of the GPU."""
    model.train()
    for batch in batches_of()[:2]:
        batch = {name: value.to(CUDA) for name, value in batch.items()}
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
