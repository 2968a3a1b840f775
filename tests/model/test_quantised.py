"""Linear layers of quantisation libraries, by stand-ins (tests/packed.py).

`tests/integrations/test_quantised_libraries.py` has the libraries themselves, where they are installed.
"""

from __future__ import annotations

import math

import pytest
import torch
from mixtures import mixture
from packed import EetqLinear, Mxfp4GptOssExperts, OldQuantLinear, TorchLinear, replaced
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
