"""Bases in 4 and 8 bits, loaded by transformers into bitsandbytes' layers, from calibration to the exported adapter."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mixtures import mixture, null_spaces
from packed import OldQuantLinear, TorchLinear
from peft import LoraConfig, PeftModel, get_peft_model
from steps import IDS, logits, train
from torch import nn
from typer.testing import CliRunner

from models import random_batches, tiny
from nullspace import Covariances, NullSpaces, compute_covariances, compute_null_spaces, gradient_covariances, stream_covariances
from nullspace.analysis import drift
from nullspace.artifacts import records
from nullspace.artifacts.identity import Fingerprints, weights_of
from nullspace.cli import app
from nullspace.integrations.peft import (
    METHODS,
    adapter_drift,
    attach_subtracted,
    check_servable,
    export_lora,
    filter_adapter,
    fit_config,
    freeze_a,
    initialize_lora_nullspace_weights,
    inject_adapters,
    lora_layers,
    prepare,
    read_factors,
    save_init,
    write_init,
)
from nullspace.integrations.peft.layers import stored_weight
from nullspace.integrations.peft.shell import without_weights
from nullspace.integrations.transformers.load import empty_model, load_weights
from nullspace.model.linear import weight_shape
from nullspace.model.sites import find_targets
from nullspace.model.weights import size_in_bytes
from nullspace.planning.survey import Survey
from reference import recorded_inputs, second_moment

bitsandbytes = pytest.importorskip("bitsandbytes")

RANK = 8
ALTERING = [name for name, each in METHODS.items() if each.changes_base]
UNTOUCHING = [name for name, each in METHODS.items() if not each.changes_base]

_NF4 = functools.partial(transformers.BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type="nf4")
KINDS: dict[str, Callable[..., transformers.BitsAndBytesConfig]] = {
    "nf4": functools.partial(_NF4, bnb_4bit_compute_dtype=torch.float32),
    # As FSDP wants it: two packed codes a byte, and two of these bytes called a bfloat16.
    "nf4-in-bfloat16": functools.partial(
        _NF4, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.bfloat16, bnb_4bit_use_double_quant=True
    ),
    "int8": functools.partial(transformers.BitsAndBytesConfig, load_in_8bit=True),
}
FORMS = ["nf4", "int8"]

every_kind = pytest.mark.parametrize("kind", KINDS)


def pairs(methods: Iterable[str], thorough: set[str]) -> list[tuple[str, str]]:
    """(kind, method): some methods with every kind, the others with one: all that they see of it is a dequantised weight."""
    return [(kind, method) for method in methods for kind in KINDS if kind == "nf4" or method in thorough]


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:Merge lora module"),
    pytest.mark.usefixtures("one_layout_of_four_bits"),
]


@pytest.fixture
def base(tiny_checkpoint: Path) -> Callable[..., Any]:
    """Loads the tiny checkpoint, quantised."""
    return functools.partial(load, tiny_checkpoint)


def load(checkpoint: Path, kind: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=KINDS[kind](**options), device_map="cpu", dtype=dtype
    ).eval()


@functools.cache
def calibrated(checkpoint: Path, kind: str) -> tuple[NullSpaces, Covariances, Covariances]:
    model = load(checkpoint, kind)
    batches = [random_batches(seed=seed) for seed in (1, 2)]
    sums = [
        Covariances(stream_covariances(model, each, precision="fp64", progress=False), weights_of(find_targets(model)))
        for each in batches
    ]
    return NullSpaces.from_covariances(sums[0], rank=RANK, progress=False), *sums


@pytest.fixture
def sources(tiny_checkpoint: Path) -> Callable[[str, str], dict[str, Any]]:
    def found(kind: str, method: str) -> dict[str, Any]:
        known = dict(zip(("spaces", "covariances", "preserve"), calibrated(tiny_checkpoint, kind), strict=True))
        return {name: known[name] for name in METHODS[method].needs}

    return found


def close(kind: str, checkpoint: Path, found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-6) -> bool:
    """Equal up to float32's rounding, where that is all there is.

    In 8 bits inputs are rounded, to float16 and then to one of 255 steps. An input that differs in its last bit may fall to the
    other side, which is a whole step. That happens to few of them; all of them are half a step off at worst as it is. What the
    latter costs is the distance from the dequantised model, so half of it is allowed:
    one step in one input was 0.23 of it on one CPU, and none on another.
    """
    if kind != "int8":
        return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())
    return bool((found - wanted).norm() <= 0.5 * quantisation_noise(checkpoint, kind))


@functools.cache
def quantisation_noise(checkpoint: Path, kind: str, dtype: torch.dtype = torch.float32) -> float:
    """How far the quantised model is from one that has the same weights and computes with them in float32."""
    model = load(checkpoint, kind, dtype=dtype)
    before = logits(model)
    return float((before - logits(model.dequantize().float())).norm())


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's tensors under its own names, as bytes: packed codes may look like NaN."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value.detach().clone().reshape(-1).view(torch.uint8)
        for name, value in model.state_dict().items()
        if ".lora_" not in name
    }


def unchanged(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    now = state_of(model)
    return now.keys() == state.keys() and all(torch.equal(now[name], value) for name, value in state.items())


@every_kind
def test_second_moments_are_those_of_what_the_quantised_model_computes(kind: str, base: Any, tiny_checkpoint: Path) -> None:
    model = base(kind)
    layers = find_targets(model)
    assert len(layers) == 14
    assert all(mark is None for _, mark in weights_of(layers).values())  # packed codes are not a weight's values
    spaces, sums, _ = calibrated(tiny_checkpoint, kind)
    inputs = recorded_inputs(model, random_batches(), layers)
    for name in layers:
        wanted = second_moment(inputs[name])
        assert (sums[name].matrix() - wanted).norm() <= 1e-6 * wanted.norm(), name
    for strategy in ("resident", "layerwise"):
        found = compute_null_spaces(model, random_batches(), rank=RANK, strategy=strategy, precision="fp64", progress=False)
        for name in layers:
            assert torch.allclose(found[name].eigenvalues, spaces[name].eigenvalues, rtol=1e-6), (strategy, name)


def test_spaces_of_the_full_model_serve_its_quantised_one(base: Any, tiny_checkpoint: Path) -> None:
    full = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    spaces = compute_null_spaces(full, random_batches(), rank=RANK, progress=False)
    for kind in KINDS:
        model = base(kind)
        before = logits(model)
        assert torch.equal(logits(inject_adapters(model, LoraConfig(r=RANK), spaces, method="b-zero")), before)


@pytest.mark.parametrize("kind", ["nf4", "nf4-in-bfloat16"])
def test_a_weight_that_bitsandbytes_has_repacked_is_read_as_it_was(kind: str, base: Any) -> None:
    layer = base(kind).model.layers[0].self_attn.q_proj
    expected = stored_weight(layer).clone()
    packed, quant_state = bitsandbytes.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed, quant_state
    found = stored_weight(layer)
    # Repacking rounds each block's scale to 8 bits of bfloat16; double quantisation then rounds it again, to one of 255 steps.
    assert (found - expected).abs().max() <= (2**-8 if kind == "nf4" else 2**-6) * expected.abs().max()
    assert found.dtype == expected.dtype


def test_a_forward_pass_that_repacks_weights_does_not_make_another_model(base: Any) -> None:
    model = base("nf4")
    fingerprint = Fingerprints().digest(model)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.weight.data, _ = bitsandbytes.functional._convert_weight_packed_for_cpu(
                module.weight.data, module.weight.quant_state
            )
    assert Fingerprints().digest(model) == fingerprint


@pytest.mark.parametrize(("kind", "method"), pairs([*UNTOUCHING, "lora-null"], {"b-zero", "mica", "orthogonal", "lora-null"}))
def test_methods_that_leave_the_base_alone_serve_it(
    kind: str, method: str, base: Any, sources: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = base(kind)
    before, state, frozen = logits(model), state_of(model), method == "lora-null"
    model = inject_adapters(model, LoraConfig(r=RANK, lora_alpha=12), method=method, freeze_a=frozen, **sources(kind, method))
    if method == "orthogonal":  # B A is zero up to rounding
        assert close(kind, tiny_checkpoint, logits(model), before)
    else:
        assert torch.equal(logits(model), before)
    assert model.active_adapters == ["default"]
    save_init(tmp_path / "init", model)
    assert sorted(p.name for p in (tmp_path / "init").iterdir()) == ["adapter", "nullspace.json"]
    start = {name: layer.lora_A["default"].weight.clone() for name, layer in lora_layers(model, "default").items()}
    train(model)
    for name, layer in lora_layers(model, "default").items():
        assert torch.equal(layer.lora_A["default"].weight, start[name]) == frozen, name
    assert unchanged(model, state)
    trained = logits(model)
    assert (trained - before).norm() > 1e-2 * before.norm()
    export_lora(model, tmp_path / "init" / "adapter", tmp_path / "plain", base="the-base")
    plain = PeftModel.from_pretrained(base(kind), tmp_path / "plain").eval()
    assert plain.peft_config["default"].r == RANK
    assert close(kind, tiny_checkpoint, logits(plain), trained)


@pytest.mark.parametrize(("kind", "method"), pairs(ALTERING, {"lora-null", "sc-lora"}))
def test_other_methods_take_a_second_adapter(
    kind: str, method: str, base: Any, sources: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = base(kind)
    before, state = logits(model), state_of(model)
    model = inject_adapters(model, LoraConfig(r=RANK, lora_alpha=12), method=method, **sources(kind, method))
    assert model.active_adapters == ["default", "default_subtracted"]
    assert close(kind, tiny_checkpoint, logits(model), before)
    assert unchanged(model, state)
    save_init(tmp_path / "init", model)
    assert sorted(p.name for p in (tmp_path / "init").iterdir()) == ["adapter", "nullspace.json", "subtracted"]
    second = {name: p.clone() for name, p in model.named_parameters() if "default_subtracted" in name}
    train(model)
    now = dict(model.named_parameters())
    assert second
    assert all(torch.equal(now[name], p) for name, p in second.items())
    assert unchanged(model, state)
    trained = logits(model)
    assert (trained - before).norm() > 1e-2 * before.norm()
    export_lora(model, tmp_path / "init" / "adapter", tmp_path / "plain", base="the-base")
    plain = PeftModel.from_pretrained(base(kind), tmp_path / "plain").eval()
    assert plain.peft_config["default"].r == 2 * RANK
    assert close(kind, tiny_checkpoint, logits(plain), trained, 1e-5)


@pytest.mark.parametrize("method", ["contrast", "lora-null"])
def test_a_quantised_model_that_peft_has_wrapped_gets_the_start_of_prepare(method: str, base: Any, tiny_checkpoint: Path) -> None:
    data = dict(zip(("keep", "task"), ([*random_batches(1, seed=seed)] for seed in (1, 2)), strict=True))
    given: dict[str, Any] = {**{name: data[name] for name in METHODS[method].data}, "method": method, "progress": False}
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    wrapped = get_peft_model(base("nf4"), settings).eval()
    before, state = logits(wrapped), state_of(wrapped)
    initialize_lora_nullspace_weights(wrapped, **given)
    prepared = prepare(base("nf4"), None, settings, **given)
    assert list(wrapped.peft_config) == list(prepared.peft_config) == ["default", *["default_subtracted"] * (method == "lora-null")]
    theirs = dict(prepared.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in wrapped.named_parameters() if "lora_" in name)
    assert torch.equal(logits(wrapped), before) if method == "contrast" else close("nf4", tiny_checkpoint, logits(wrapped), before)
    assert unchanged(wrapped, state)


@pytest.mark.parametrize("kind", FORMS)
def test_in_16_bits_the_second_adapter_costs_no_more_than_computing_in_16_bits(kind: str, base: Any, tiny_checkpoint: Path) -> None:
    options = {} if kind == "int8" else {"bnb_4bit_compute_dtype": torch.bfloat16}
    model = base(kind, dtype=torch.bfloat16, **options)
    before, exact = logits(model), logits(base(kind, dtype=torch.bfloat16, **options).dequantize().float())
    after = logits(inject_adapters(model, LoraConfig(r=RANK), method="pissa"))
    # Two sums more, each rounded, after every layer that has rounded a product.
    assert (after - exact).norm() <= 2 * (before - exact).norm()


PLAIN = """
import json, sys
sys.modules["nullspace"] = None
import bitsandbytes, torch, transformers
from peft import PeftModel
from safetensors.torch import load_file
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
folder, jobs = sys.argv[1], json.loads(sys.argv[2])
for name, bits in jobs.items():
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{bits}").eval()
    known = load_file(f"{folder}/{name}.safetensors")
    model = PeftModel.from_pretrained(model, f"{folder}/{name}/trained").eval()
    if known["subtracted"]:
        model.load_adapter(f"{folder}/{name}/subtracted", adapter_name="subtracted")
        model.base_model.set_adapter(["default", "subtracted"])
    with torch.no_grad():
        error = (model(input_ids=known["input_ids"]).logits - known["logits"]).norm()
    assert float(error) <= float(known["tolerance"]), (name, float(error), float(known["tolerance"]))
"""


@pytest.mark.processes
def test_what_is_saved_loads_with_plain_peft_onto_a_quantised_checkpoint(
    base: Any, sources: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    jobs: dict[str, str] = {}
    for kind in FORMS:
        base(kind).save_pretrained(tmp_path / kind)
        for method, frozen in (("b-zero", True), ("lora-null", True), ("lora-null", False)):
            config = LoraConfig(r=RANK, lora_alpha=3)
            model = inject_adapters(base(kind), config, method=method, freeze_a=frozen, **sources(kind, method))
            name = f"{kind}-{method}-{frozen}"
            save_init(tmp_path / name, model)
            train(model)
            model.save_pretrained(tmp_path / name / "trained", selected_adapters=["default"])
            wanted = logits(model)
            noise = 0.2 * quantisation_noise(tiny_checkpoint, kind) if kind == "int8" else 2e-6 * float(wanted.norm())
            numbers = {"tolerance": noise, "subtracted": METHODS[method].changes_base and not frozen}
            known = {"input_ids": IDS, "logits": wanted, **{name: torch.tensor(value) for name, value in numbers.items()}}
            records.write_tensors(tmp_path / f"{name}.safetensors", known)
            jobs[name] = kind
    subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path), json.dumps(jobs)], check=True)


@every_kind
def test_gradients_of_a_quantised_model_are_those_of_the_dequantised_one(kind: str, base: Any) -> None:
    batches = [{**batch, "labels": batch["input_ids"]} for batch in random_batches(2)]
    model = base(kind)
    state = state_of(model)
    found, expected = (gradient_covariances(each, batches, progress=False) for each in (model, base(kind).dequantize()))
    assert unchanged(model, state)
    for site in expected.sites:
        wanted = expected[site.name].matrix()
        # 8 bits round inputs, which the dequantised model does not.
        assert (found[site.name].matrix() - wanted).norm() <= (0.2 if kind == "int8" else 1e-4) * wanted.norm(), site


@every_kind
def test_a_quantised_weight_is_not_turned_into_a_residual(kind: str, base: Any, sources: Any, tmp_path: Path) -> None:
    model = base(kind)
    before, state = logits(model), state_of(model)
    layer = r"'model\.layers\.0\.self_attn\.q_proj' \(Linear.*quantised"
    words = rf"{layer}.*residual=\"adapter\".*'b-zero', 'contrast', 'inflora', .*'eva' and 'orthogonal'"
    for refused in (
        lambda: inject_adapters(model, LoraConfig(r=RANK), method="pissa", residual="base"),
        lambda: check_servable(model, find_targets(model), "pissa", offloaded=True),
        lambda: write_init(tmp_path / "out", model, LoraConfig(r=RANK), method="pissa", residual="base"),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
        assert unchanged(model, state)
        assert torch.equal(logits(model), before)
        assert not hasattr(model, "peft_config")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "method", "frozen"),
    [
        *((kind, method, None) for kind, method in pairs(METHODS, {"b-zero", "mica"})),
        *(("int8", "lora-null", frozen) for frozen in (False, True)),
    ],
)
def test_write_init_writes_what_injecting_and_saving_does(
    kind: str, method: str, frozen: bool | None, base: Any, sources: Any, tmp_path: Path
) -> None:
    model, config, given = base(kind), LoraConfig(r=RANK, lora_alpha=12, lora_dropout=0.1), sources(kind, method)
    before, two = logits(model), METHODS[method].changes_base and not frozen
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="lora_dropout") if two else contextlib.nullcontext():
        write_init(tmp_path / "two", model, config, method=method, freeze_a=frozen, progress=False, **given)
    assert (tmp_path / "two" / "subtracted").is_dir() == two
    assert torch.equal(logits(model), before)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="lora_dropout") if two else contextlib.nullcontext():
        injected = inject_adapters(model, config, method=method, freeze_a=frozen, **given)
    save_init(tmp_path / "one", injected, given.get("spaces"))
    names = [{p.relative_to(tmp_path / out) for p in (tmp_path / out).rglob("*") if p.is_file()} for out in ("one", "two")]
    assert names[0] == names[1]
    for name in names[0]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@every_kind
def test_a_model_without_its_weights_holds_no_copy_of_quantised_ones(kind: str, base: Any) -> None:
    model = base(kind)
    logits(model)  # after which a layer in 8 bits holds its weight twice
    before = {id(own) for own in model.modules()}
    shell = without_weights(model)
    for name, layer in shell.named_modules():
        assert id(layer) not in before
        if type(layer).__module__.startswith("bitsandbytes"):
            mine = model.get_submodule(name)
            assert layer.weight is mine.weight
            assert getattr(layer, "state", None) is getattr(mine, "state", None)
            assert getattr(layer, "quant_state", None) is getattr(mine, "quant_state", None)


def test_layers_left_out_of_quantisation_take_a_second_adapter_too(base: Any, tmp_path: Path) -> None:
    model = base("nf4", llm_int8_skip_modules=["o_proj", "lm_head"])
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    before, config = logits(model), LoraConfig(r=RANK, target_modules=["o_proj"])
    # transformers would save the base as its quantiser knows it, and lose the residual.
    for refused in (
        lambda: inject_adapters(model, config, method="pissa", residual="base"),
        lambda: write_init(tmp_path / "out", model, config, method="pissa", residual="base"),
    ):
        with pytest.raises(ValueError, match=r"o_proj' is part of a quantised model.*residual=\"adapter\""):
            refused()
    adapted = inject_adapters(model, config, method="pissa")
    assert adapted.active_adapters == ["default", "default_subtracted"]
    assert (logits(adapted) - before).abs().max() <= 2e-6 * before.abs().max()


class _Packed(nn.Linear):
    """A stand-in for a quantised layer that nobody here can read."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.weight = nn.Parameter(torch.zeros(like.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


@functools.cache
def of_the_full_model() -> tuple[NullSpaces, Covariances]:
    sums = Covariances(stream_covariances(tiny("llama"), random_batches(), progress=False))
    return NullSpaces.from_covariances(sums, rank=RANK, progress=False), sums


@pytest.mark.parametrize("residual", ["auto", "adapter", "base"])
def test_what_cannot_be_read_is_refused_by_the_methods_that_look_at_the_weight(residual: str, tmp_path: Path) -> None:
    spaces, sums = of_the_full_model()
    # Those of the full model, but for what would tell it from the packed one.
    known = {"spaces": NullSpaces([spaces[site.name] for site in spaces.sites]), "covariances": sums, "preserve": sums}
    for method, each in METHODS.items():
        if not each.reads_weight and residual != "auto":  # which subtract nothing
            continue
        model = tiny("llama")
        model.model.layers[1].mlp.up_proj = _Packed(model.model.layers[1].mlp.up_proj)
        state = state_of(model)
        given = {name: known[name] for name in each.needs}
        if not each.reads_weight:
            adapted = inject_adapters(model, LoraConfig(r=RANK), method=method, residual=residual, **given)
            assert len(lora_layers(adapted, "default")) == len(spaces)
            assert unchanged(adapted, state)
            continue
        with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj' \(_Packed.*quantised.*'eva' and 'orthogonal'"):
            inject_adapters(model, LoraConfig(r=RANK), method=method, residual=residual, **given)
        assert unchanged(model, state)
        assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("kind", FORMS)
def test_the_exported_adapter_merges_into_the_dequantised_base(
    kind: str, base: Any, sources: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Into the quantised one PEFT merges too, but rounds the sum to its grid again, once for each adapter."""
    model = inject_adapters(base(kind), LoraConfig(r=RANK), method="lora-null", **sources(kind, "lora-null"))
    save_init(tmp_path / "init", model)
    train(model)
    export_lora(model, tmp_path / "init" / "adapter", tmp_path / "plain", base="the-base")
    full = base(kind).dequantize()
    wanted = logits(PeftModel.from_pretrained(full, tmp_path / "plain").eval())
    merged = logits(PeftModel.from_pretrained(base(kind).dequantize(), tmp_path / "plain").merge_and_unload())
    assert (merged - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    # 8 bits round inputs, which the dequantised model does not.
    far = (logits(model) - merged).norm()
    assert far <= (1e-5 * merged.norm() if kind == "nf4" else 2 * quantisation_noise(tiny_checkpoint, kind))


@pytest.mark.parametrize("kind", FORMS)
def test_the_trainer_keeps_the_second_adapter_as_it_is_and_active(
    kind: str, base: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 200, (8, 16))]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        save_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )

    def run(model: Any, **options: Any) -> Any:
        frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        assert any("default_subtracted" in name for name in frozen)
        transformers.Trainer(model, arguments, train_dataset=rows).train(**options)
        now = dict(model.named_parameters())
        assert all(torch.equal(now[name], p) for name, p in frozen.items())
        assert model.active_adapters == ["default", "default_subtracted"]
        return logits(model.eval())

    def injected() -> Any:
        return inject_adapters(base(kind), LoraConfig(r=RANK, task_type="CAUSAL_LM"), method="pissa")

    wanted = run(injected())
    assert (wanted - logits(base(kind))).norm() > 1e-2 * wanted.norm()
    resumed = run(injected(), resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert close(kind, tiny_checkpoint, resumed, wanted)
    # What it saved, loaded to be trained on.
    saved = tmp_path / "checkpoint-2"
    again = PeftModel.from_pretrained(base(kind), saved, is_trainable=True)
    attach_subtracted(again, saved / "default_subtracted")
    freeze_a(again)
    assert close(kind, tiny_checkpoint, logits(again.eval()), wanted)


@pytest.mark.parametrize("kind", FORMS)
def test_an_adapter_is_filtered_and_its_drift_is_of_the_dequantised_weights(
    kind: str, base: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    _, task, keep = calibrated(tiny_checkpoint, kind)
    model = get_peft_model(base(kind), LoraConfig(r=RANK, target_modules=["q_proj", "down_proj"]))
    train_b(model)
    model.save_pretrained(tmp_path / "trained")
    base(kind).save_pretrained(tmp_path / "base")
    given: dict[str, Any] = {"retain": 0.8, "progress": False}
    result = filter_adapter(tmp_path / "trained", task, keep, tmp_path / "out", base=tmp_path / "base", **given)
    assert filter_adapter(model, task, keep, **given).path == result.path
    full, factors = base(kind).dequantize(), read_factors(tmp_path / "out")
    wanted = {name: drift(full.get_submodule(name).weight, keep[name].matrix(), pair) for name, pair in factors.items()}
    for adapter, of in ((tmp_path / "out", base(kind)), (tmp_path / "out", tmp_path / "base"), (model, None)):
        assert adapter_drift(adapter, keep, of, progress=False).layers == pytest.approx(wanted, rel=1e-4)
    assert result.after.drift == pytest.approx(statistics.median(wanted.values()), rel=1e-4)


def test_a_filter_needs_no_weights_but_for_a_budget_of_drift() -> None:
    task, keep = (Covariances(stream_covariances(tiny("llama"), random_batches(seed=seed), progress=False)) for seed in (1, 2))
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj = _Packed(model.model.layers[1].mlp.up_proj)
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules=["up_proj"]))
    train_b(adapted)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj' \(_Packed.*name a base that is not quantised"):
        filter_adapter(adapted, task, keep, drift=1e-3, progress=False)
    result = filter_adapter(adapted, task, keep, retain=0.8, progress=False)
    assert result.after.drift is None
    assert result.after.response == pytest.approx(0.8, rel=1e-6)


def train_b(model: Any) -> None:
    for layer in lora_layers(model, "default").values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)


def test_a_checkpoint_of_another_quantised_model_is_not_taken_for_this_ones(base: Any, tmp_path: Path) -> None:
    for kind in KINDS:
        compute = functools.partial(
            compute_null_spaces, loader=random_batches(1), rank=RANK, checkpoint=tmp_path / kind, progress=False
        )
        compute(base(kind))
        compute(base(kind))
        other = base(kind)
        weight = other.model.layers[1].mlp.up_proj.weight
        with torch.no_grad():  # weights differ that are quantised, and no others
            weight.view(torch.uint8).bitwise_xor_(1)
        with pytest.raises(ValueError, match="checkpoint of another run"):
            compute(other)


@pytest.fixture(scope="module")
def data(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.txt"
    path.write_text("\n\n".join(prose[:3]))
    return path


def nullspace(command: str, *options: Any) -> Any:
    return CliRunner().invoke(app, [command, *(str(each) for each in options)])


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("saved", [False, True], ids=["loaded so", "saved so"])
def test_from_the_command_line_through_training_to_a_plain_adapter(
    kind: str, saved: bool, base: Any, tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """The checkpoint is quantised while it is loaded, or was saved quantised. What is trained is loaded as PEFT's users do it."""
    checkpoint, out = tiny_checkpoint, tmp_path / "out"
    if saved:
        checkpoint = tmp_path / "quantised"
        base(kind).save_pretrained(checkpoint)
        transformers.AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(checkpoint)
    flag = [] if saved else ["--load-in-4bit" if kind == "nf4" else "--load-in-8bit"]
    common = [checkpoint, *flag, "--data", data, "--out", out, "--samples", 4, "--length", 64, "--rank", 8, "--device", "cpu"]
    done = nullspace("init", *common)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "nullspace.json", "spaces", "subtracted"]
    assert "attach_subtracted" in done.output
    assert ("quantization_config" in done.output) != saved
    assert ("bnb_4bit_compute_dtype=torch.float32" in done.output) == (kind == "nf4" and not saved)
    assert json.loads((out / "nullspace.json").read_text())["residual"] == "adapter"
    model = PeftModel.from_pretrained(base(kind), out / "adapter", is_trainable=True)
    attach_subtracted(model, out / "subtracted")
    before = logits(base(kind))
    assert close(kind, tiny_checkpoint, logits(model.eval()), before)
    train(model)
    trained = logits(model)
    assert (trained - before).norm() > 1e-2 * before.norm()
    model.save_pretrained(tmp_path / "trained", selected_adapters=["default"])
    exported = nullspace("export", tmp_path / "trained", "--initial", out, "--out", tmp_path / "plain", "-q")
    assert exported.exit_code == 0, exported.output
    plain = PeftModel.from_pretrained(base(kind), tmp_path / "plain").eval()
    assert plain.peft_config["default"].base_model_name_or_path == str(checkpoint)
    assert close(kind, tiny_checkpoint, logits(plain), trained, 1e-5)


def test_what_the_command_line_refuses_of_quantised_models(base: Any, tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    base("nf4").save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    for checkpoint, options, words in (
        (folder, ["--residual", "base"], "q_proj"),
        (folder, ["--offload"], "quantised"),
        (folder, ["--load-in-8bit"], "quantised already"),
        (tiny_checkpoint, ["--load-in-8bit", "--load-in-4bit"], "without --load-in"),
        (tiny_checkpoint, ["--load-in-8bit", "--offload"], "without --offload"),
        (folder, ["--residual", "adapter", "--method", "b-zero"], "methods that change the base"),
    ):
        common = [checkpoint, "--data", data, "--out", tmp_path / "out", "--length", 64, "--rank", 8, "-q", "--device", "cpu"]
        refused = nullspace("init", *common, *options)
        assert refused.exit_code == 2, (options, refused.output)
        assert words in " ".join(refused.output.split())
        assert sorted(p.name for p in tmp_path.iterdir()) == ["quantised"]  # before the work


def test_a_second_adapter_is_written_for_any_base_that_is_to_stay_as_it_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    before = logits(model)
    write_init(tmp_path / "out", model, LoraConfig(r=RANK), method="pissa", residual="adapter", progress=False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter", "nullspace.json", "subtracted"]
    adapted = PeftModel.from_pretrained(model, tmp_path / "out" / "adapter")
    attach_subtracted(adapted, tmp_path / "out" / "subtracted")
    assert (logits(adapted.eval()) - before).abs().max() <= 2e-6 * before.abs().max()
    with pytest.raises(ValueError, match="use_dora"):
        write_init(tmp_path / "two", tiny("llama"), LoraConfig(r=RANK, use_dora=True), method="pissa", residual="adapter")


def test_statistics_of_the_full_model_and_of_the_quantised_one_serve_each_other(
    base: Any, tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """Quantised weights have no fingerprint, so names and shapes are compared: the sums are of the same layers' inputs."""
    run = ["--samples", 2, "--length", 64, "-q", "--device", "cpu"]
    done = nullspace("covariances", tiny_checkpoint, "--load-in-4bit", "--data", data, "--out", tmp_path / "four", *run)
    assert done.exit_code == 0, done.output
    full = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    compute_covariances(full, random_batches(), tmp_path / "full", progress=False)
    for name, flag in (("four", []), ("full", ["--load-in-4bit"])):
        out = tmp_path / f"of-{name}"
        done = nullspace("init", tiny_checkpoint, "--covariances", tmp_path / name, "--out", out, "--rank", 8, *run[-3:], *flag)
        assert done.exit_code == 0, done.output
        assert (out / "subtracted").is_dir() == bool(flag)
        assert json.loads((out / "nullspace.json").read_text()).get("load_in_4bit", False) == bool(flag)
    model = base("nf4")
    sums = Covariances.load(tmp_path / "full")
    adapted = inject_adapters(model, LoraConfig(r=RANK), method="corda-kpm", covariances=sums)
    assert close("nf4", tiny_checkpoint, logits(adapted), logits(base("nf4")))
    other = Covariances([(site, sums[site.name]) for site in sums.sites], {"model.layers.0.mlp.up_proj": ((3, 64), None)})
    with pytest.raises(ValueError, match=r"of another model.*up_proj"):
        inject_adapters(base("nf4"), LoraConfig(r=RANK), method="corda-kpm", covariances=other)


def test_a_plan_counts_the_bytes_of_quantised_weights(tiny_checkpoint: Path, base: Any, tmp_path: Path) -> None:
    base("nf4").save_pretrained(tmp_path / "four")
    full = size_in_bytes(empty_model(tiny_checkpoint, dtype=torch.bfloat16))
    linear = sum(math.prod(weight_shape(layer)) for layer in find_targets(empty_model(tiny_checkpoint)).values())
    for model, bits in (
        (empty_model(tiny_checkpoint, dtype=torch.bfloat16, load_in_4bit=True), 4.5),
        (empty_model(tiny_checkpoint, dtype=torch.bfloat16, load_in_8bit=True), 8),
        (empty_model(tmp_path / "four", dtype=torch.bfloat16), 4.5),
    ):
        assert size_in_bytes(model) == full - linear * (16 - bits) / 8
        assert Survey(model, batch_size=2, length=16, device="cpu").tracked
    done = nullspace("plan", tiny_checkpoint, "--load-in-4bit", "--device", "cpu", "--length", 64, "--rank", 8, "--json")
    assert done.exit_code == 0, done.output
    refused = nullspace("plan", tmp_path / "four", "--load-in-8bit")
    assert refused.exit_code == 2
    assert "quantised already" in refused.output


def test_experts_beside_quantised_layers_get_two_adapters_too(tmp_path: Path) -> None:
    """bitsandbytes leaves experts that are one tensor as they are, which is said."""
    mixture("qwen3_moe").save_pretrained(tmp_path / "model")
    load = functools.partial(load_weights, tmp_path / "model", device="cpu", dtype=torch.float32, load_in_4bit=True)
    with pytest.warns(UserWarning, match=r"load_in_4bit: the experts of .* stay in torch.float32"):
        model = load()
    before, spaces = logits(model), null_spaces(model, RANK)
    write_init(tmp_path / "init", model, LoraConfig(r=RANK), spaces, progress=False)
    adapted = PeftModel.from_pretrained(model, tmp_path / "init" / "adapter", is_trainable=True)
    attach_subtracted(adapted, tmp_path / "init" / "subtracted")
    assert set(lora_layers(adapted, "default")) == set(spaces)
    assert (logits(adapted.eval()) - before).abs().max() <= 3e-6 * before.abs().max()
    train(adapted)
    trained = logits(adapted)
    assert (trained - before).norm() > 1e-2 * before.norm()
    export_lora(adapted, tmp_path / "init" / "adapter", tmp_path / "plain", base="the-base")
    with pytest.warns(UserWarning, match="stay in"):
        plain = PeftModel.from_pretrained(load(), tmp_path / "plain").eval()
    assert (logits(plain) - trained).abs().max() <= 1e-5 * trained.abs().max()


def test_layers_that_peft_does_not_know_are_left_out_and_named() -> None:
    model = tiny("llama")
    layers = model.model.layers
    for layer, kind in ((layers[0], TorchLinear), (layers[1], OldQuantLinear)):
        layer.mlp.up_proj = kind(layer.mlp.up_proj)
    every = find_targets(model)
    assert check_servable(model, every.only(["model.layers.0.mlp.up_proj"]), "pissa", residual="auto") == "adapter"
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj' \(QuantLinear.*quantised.*'b-zero'"):
        check_servable(model, every, "pissa", residual="auto")
    assert check_servable(model, every, "b-zero") == "none"
    fitted = fit_config(LoraConfig(r=RANK, target_modules=list(every)), model, every)
    with pytest.warns(UserWarning, match=r"layers\.0\.mlp\.up_proj' gets no .*layers\.1\.mlp\.up_proj' gets no adapter from PEFT"):
        every.settle(model)
    assert len(fitted.target_modules or ()) == len(every) == len(find_targets(tiny("llama"))) - 2
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.up_proj' gets no adapter from PEFT"):
        inject_adapters(model, LoraConfig(r=RANK, target_modules=["up_proj"]), method="orthogonal")
