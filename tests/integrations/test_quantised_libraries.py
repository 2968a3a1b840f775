"""torchao, quanto, HQQ and GPTQModel themselves, where they are installed: from calibration to the exported adapter.

None is a dependency, not even of the tests. `tests/model/test_quantised.py` has stand-ins.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from steps import logits, train
from torch import nn

from models import random_batches
from nullspace import compute_null_spaces
from nullspace.artifacts.identity import Fingerprints, weights_of
from nullspace.integrations.peft import attach_subtracted, export_lora, inject_adapters, lora_layers, save_init, write_init
from nullspace.integrations.peft.layers import computed_weight
from nullspace.integrations.transformers.load import load_weights
from nullspace.model.coverage import matrices
from nullspace.model.linear import weight_shape
from nullspace.model.sites import find_targets

RANK = 8
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def _torchao(config: str) -> Callable[[Path], Any]:
    def load(checkpoint: Path) -> Any:
        quantisation = pytest.importorskip("torchao.quantization")
        own = transformers.TorchAoConfig(getattr(quantisation, config)())
        return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=own, dtype=torch.float32)

    return load


def _quanto(weights: str) -> Callable[[Path], Any]:
    def load(checkpoint: Path) -> Any:
        pytest.importorskip("optimum.quanto")
        own = transformers.QuantoConfig(weights=weights)
        return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=own, dtype=torch.float32)

    return load


def _replaced(checkpoint: Path, make: Callable[[nn.Linear], nn.Module]) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, make(module))
    return model


def _hqq(checkpoint: Path) -> Any:
    core = pytest.importorskip("hqq.core.quantize")
    own = core.BaseQuantizeConfig(nbits=4, group_size=32)
    return _replaced(checkpoint, lambda layer: core.HQQLinear(layer, own, compute_dtype=torch.float32, device="cpu"))


def _gptq(checkpoint: Path) -> Any:
    kernels = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")

    def make(layer: nn.Linear) -> nn.Module:
        sizes: dict[str, Any] = {"in_features": layer.in_features, "out_features": layer.out_features, "group_size": 32}
        own = kernels.TorchLinear(
            bits=4, sym=True, desc_act=False, bias=False, pack_dtype=torch.int32, register_buffers=True, **sizes
        )
        generator = torch.Generator().manual_seed(layer.in_features)
        for name in ("qweight", "qzeros"):
            codes = getattr(own, name)
            codes.copy_(torch.randint(-(2**31), 2**31, codes.shape, generator=generator))
        own.scales.fill_(0.01)
        own.post_init()
        module: nn.Module = own
        return module

    return _replaced(checkpoint, make)


def compressed(checkpoint: Path, folder: Path) -> None:
    """A checkpoint as llm-compressor saves it."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    forms = pytest.importorskip("compressed_tensors.quantization")
    weights = forms.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    groups = {"all": forms.QuantizationScheme(targets=["Linear"], weights=weights)}
    own = forms.QuantizationConfig(
        config_groups=groups, ignore=["lm_head"], format="pack-quantized", quantization_status="compressed"
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    forms.apply_quantization_config(model, own)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight_scale.data.copy_(layer.weight.detach().reshape(len(layer.weight), -1, 32).abs().amax(-1) / 7)  # type: ignore[operator,union-attr]
    compressors.ModelCompressor.from_pretrained_model(model).compress_model(model)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    settings = {**own.model_dump(mode="json"), "quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


KINDS: dict[str, Callable[[Path], Any]] = {
    "torchao-int8": _torchao("Int8WeightOnlyConfig"),
    "torchao-float8": _torchao("Float8WeightOnlyConfig"),
    "quanto-int4": _quanto("int4"),
    "quanto-float8": _quanto("float8"),
    "hqq": _hqq,
    "gptq": _gptq,
}


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_calibration_to_a_plain_adapter(kind: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = KINDS[kind](tiny_checkpoint).eval()
    layers = find_targets(model)
    assert len(layers) == 14
    digest = Fingerprints().digest(model)
    assert digest == Fingerprints().digest(KINDS[kind](tiny_checkpoint))
    assert all(mark is None for _, mark in weights_of(layers).values())
    full = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    assert dict(matrices(model)) == dict(matrices(full))
    read = {name: computed_weight(name, layer).float() for name, layer in layers.items()}
    before = logits(model)
    for name, layer in layers.items():
        x = torch.randn(1, 5, weight_shape(layer)[1])
        wanted = layer(x)
        assert (x @ read[name].T - wanted).norm() <= 1e-5 * wanted.norm(), name
    spaces = compute_null_spaces(model, random_batches(), rank=RANK, progress=False)
    assert Fingerprints().digest(model) == digest
    write_init(tmp_path / "init", model, LoraConfig(r=RANK, lora_alpha=12), spaces, progress=False)
    assert torch.equal(logits(model), before)
    assert Fingerprints().digest(model) == digest
    save_init(tmp_path / "same", inject_adapters(model, LoraConfig(r=RANK, lora_alpha=12), spaces), spaces)
    for path in ("adapter", "subtracted"):
        file = Path(path, "adapter_model.safetensors")
        assert (tmp_path / "init" / file).read_bytes() == (tmp_path / "same" / file).read_bytes()
    model = PeftModel.from_pretrained(KINDS[kind](tiny_checkpoint), tmp_path / "init" / "adapter", is_trainable=True)
    attach_subtracted(model, tmp_path / "init" / "subtracted")
    assert len(lora_layers(model, "default")) == 14
    assert (logits(model.eval()) - before).norm() <= 1e-5 * before.norm()
    train(model)
    trained = logits(model)
    assert (trained - before).norm() > 1e-2 * before.norm()
    export_lora(model, tmp_path / "init" / "adapter", tmp_path / "plain", base="the-base")
    plain = PeftModel.from_pretrained(KINDS[kind](tiny_checkpoint), tmp_path / "plain").eval()
    assert (logits(plain) - trained).norm() <= 1e-5 * trained.norm()


def test_a_digest_tells_quantised_weights_apart(tiny_checkpoint: Path) -> None:
    pytest.importorskip("torchao")
    model = KINDS["torchao-int8"](tiny_checkpoint)
    before = Fingerprints().digest(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    getattr(weight, weight.__tensor_flatten__()[0][0]).add_(1)
    assert Fingerprints().digest(model) != before


def test_a_compressed_checkpoint_is_loaded_dequantised(tiny_checkpoint: Path, tmp_path: Path) -> None:
    compressed(tiny_checkpoint, tmp_path / "model")
    lazy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"q_proj' is compressed until the model's first forward pass.*dequantize=True"):
        write_init(tmp_path / "out", lazy, LoraConfig(r=RANK), method="pissa")
    model = load_weights(tmp_path / "model", device="cpu", dtype=torch.float32)
    before = logits(model)
    assert (logits(lazy) - before).norm() <= 1e-5 * before.norm()
    write_init(tmp_path / "out", model, LoraConfig(r=RANK), method="pissa", progress=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32)  # an ordinary one
    assert (logits(PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()) - before).norm() <= 1e-5 * before.norm()
