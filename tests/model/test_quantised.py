"""Linear layers of quantisation libraries, by stand-ins with their classes' names, packages, buffers and forward passes.

`tests/integrations/test_quantised_libraries.py` has the libraries themselves, where they are installed.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mixtures import mixture
from torch import nn

from models import random_batches, tiny
from nullspace import compute_null_spaces
from nullspace.artifacts.identity import Fingerprints, weights_of
from nullspace.model.coverage import matrices
from nullspace.model.linear import is_linear, weight_of, weight_shape
from nullspace.model.quantised import dequantised, is_dequantisable, is_quantised_layer
from nullspace.model.sites import find_targets
from nullspace.model.weights import size_in_bytes
from nullspace.planning.survey import Survey


def of_package(package: str, name: str = "") -> Any:
    """Decorator: a class as another package defines it."""

    def renamed(kind: type) -> type:
        kind.__module__ = package
        kind.__name__ = name or kind.__name__
        return kind

    return renamed


@of_package("gptqmodel.nn_modules.qlinear")
class BaseQuantLinear(nn.Module):
    """GPTQ: eight codes of 4 bits in an int32, along the inputs; one scale for 8 inputs. Computes in float16 scales' values."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        groups_gno = like.weight.detach().T.reshape(like.in_features // 8, 8, like.out_features)
        scales = groups_gno.abs().amax(1) / 7
        codes = (groups_gno / scales[:, None]).round().long() + 8
        packed = sum(codes[:, i] << (4 * i) for i in range(8))
        self.register_buffer("qweight", (packed - (packed >= 2**31) * 2**32).to(torch.int32))
        self.register_buffer("qzeros", torch.full((like.in_features // 8, like.out_features // 8), 0x77777777, dtype=torch.int32))
        self.register_buffer("scales", scales.half())
        self.register_buffer("g_idx", torch.arange(like.in_features, dtype=torch.int32) // 8)
        self.bias = None

    def values(self) -> torch.Tensor:
        """(d_out, d_in)"""
        codes = torch.stack([(self.qweight >> (4 * i)) & 15 for i in range(8)], 1).reshape(self.in_features, self.out_features)
        return ((codes - 8) * self.scales[self.g_idx]).T.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ self.values().T).to(x.dtype)


@of_package("gptqmodel.nn_modules.qlinear.torch")
class TorchLinear(BaseQuantLinear):
    pass


@of_package("transformers.integrations.eetq")
class EetqLinear(nn.Module):
    """EETQ: int8, (d_in, d_out); no record of its shape. It takes float16 alone."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        scales = like.weight.detach().abs().amax(1) / 127
        codes = (like.weight.detach() / scales[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(codes.T.contiguous(), requires_grad=False)
        self.weight_scales = nn.Parameter(scales.half(), requires_grad=False)
        self.bias = nn.Parameter(torch.linspace(-100, 100, like.out_features).half())

    def values(self) -> torch.Tensor:
        return (self.weight * self.weight_scales).T.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float16:
            raise RuntimeError("expected scalar type Half")
        return ((x.float() @ self.values().T) + self.bias.float()).half()


@of_package("auto_gptq.nn_modules.qlinear.qlinear_cuda", "QuantLinear")
class OldQuantLinear(BaseQuantLinear):
    """With the older names of its sizes, and a kernel that this machine has not."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like)
        self.infeatures, self.outfeatures = like.in_features, like.out_features
        del self.in_features, self.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")


def replaced(model: Any, kind: type) -> Any:
    """The model with all linear layers but the head in a quantised form."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, kind(module))
    return model.eval()


@pytest.mark.parametrize("kind", [TorchLinear, EetqLinear, OldQuantLinear])
def test_a_layer_of_another_library_is_linear(kind: type) -> None:
    full = nn.Linear(48, 32, bias=False)
    layer = kind(full)
    assert is_quantised_layer(layer)
    assert is_linear(layer)
    assert weight_shape(layer) == (32, 48)
    assert not weight_of(layer).is_floating_point()  # the codes
    assert weights_of({"layer": layer})["layer"] == ((32, 48), None)
    assert is_dequantisable(layer, weight_of(layer)) == (kind is not OldQuantLinear)
    if kind is not OldQuantLinear:
        found = dequantised(layer, weight_of(layer))
        # Read from the layer's outputs: a large bias must not hide the weight in float16.
        assert (found - layer.values()).abs().max() <= 2**-10 * full.weight.abs().max()


def test_only_classes_of_the_libraries_themselves_count() -> None:
    class QuantLinear(nn.Module):
        in_features = out_features = 8

    assert not is_linear(QuantLinear())
    assert not is_dequantisable(nn.Linear(8, 8), nn.Linear(8, 8).weight)


def test_a_quantised_model_is_calibrated_and_planned() -> None:
    full, model = tiny("llama"), replaced(tiny("llama"), TorchLinear)
    assert list(find_targets(model)) == list(find_targets(full))
    assert dict(matrices(model)) == dict(matrices(full))
    assert size_in_bytes(model) < size_in_bytes(full)
    batches = random_batches()
    for strategy in ("resident", "layerwise"):
        spaces = compute_null_spaces(model, batches, rank=8, strategy=strategy, progress=False)
        assert set(spaces) == set(find_targets(full))
    survey = Survey(model, batch_size=2, length=16, device="cpu")
    assert {site.name for site in survey.sites} <= set(find_targets(full))
    assert survey.weights == size_in_bytes(model)


def test_the_digest_sees_every_code_and_scale() -> None:
    before = Fingerprints().digest(replaced(tiny("llama"), TorchLinear))
    for name in ("qweight", "scales"):
        model = replaced(tiny("llama"), TorchLinear)
        assert Fingerprints().digest(model) == before
        getattr(model.model.layers[0].mlp.up_proj, name).add_(1)
        assert Fingerprints().digest(model) != before, name
    eights = nn.ModuleDict({"layer": nn.Linear(8, 8, bias=False).requires_grad_(False).to(torch.float8_e4m3fn)})
    before = Fingerprints().digest(eights)
    eights["layer"].weight.view(torch.uint8).bitwise_xor_(1)
    assert Fingerprints().digest(eights) != before


@of_package("transformers.integrations.mxfp4")
class Mxfp4GptOssExperts(nn.Module):
    """Two codes of 4 bits in a byte. Once loaded, the codes are no parameters any more."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = (
            experts.num_experts,
            experts.hidden_size,
            experts.intermediate_size,
        )
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(self.num_experts, 2 * self.intermediate_size))
        self.down_proj_bias = nn.Parameter(torch.zeros(self.num_experts, self.hidden_size))


def test_packed_experts_count_with_the_weights_that_they_hold() -> None:
    full, model = mixture("gpt_oss"), mixture("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(layer.mlp.experts)
    assert sum(size for _, size in matrices(model)) == sum(size for _, size in matrices(full))
    share = {name: size for name, size in matrices(model) if ".experts." in name}
    assert len(share) == 2 * len(model.model.layers)
    targets = find_targets(model)
    assert not any("experts" in name for name in targets)
    missed = 1 - sum(math.prod(weight_shape(m)) for m in targets.values()) / sum(size for _, size in matrices(full))
    with pytest.warns(UserWarning, match=rf"experts\.gate_up_proj.*quantised in Mxfp4GptOssExperts.*dequantize=True.*{missed:.2%}"):
        targets.settle(model)
