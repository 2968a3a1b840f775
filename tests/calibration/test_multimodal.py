"""Models with vision and audio towers: text alone, and images and padding side by side."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from models import random_batches
from multimodal import IMAGE, MULTIMODAL, collated, samples, tiny_multimodal
from nullspace import Covariance, compute_null_spaces, gradient_covariances, stream_covariances
from reference import relative_error


def sums(model: nn.Module, loader: Any, strategy: str = "resident", **options: Any) -> dict[str, Covariance]:
    """Layer name → its covariance."""
    found = stream_covariances(model, loader, strategy=strategy, precision="fp64", progress=False, **options)
    return {member: covariance for site, covariance in found for member in site.members}


def assert_same(found: dict[str, Covariance], expected: dict[str, Covariance]) -> None:
    assert found.keys() == expected.keys()
    for name, covariance in expected.items():
        assert found[name].tokens == covariance.tokens, name
        assert relative_error(found[name].matrix(), covariance.matrix()) < 1e-5, name


# ---- text alone


@pytest.mark.parametrize("family", list(MULTIMODAL))
def test_text_alone_leaves_out_what_it_does_not_reach(family: str) -> None:
    model = tiny_multimodal(family)
    batches = [{**batch, "input_ids": batch["input_ids"] % IMAGE} for batch in random_batches(2, 3, 12, padding="left")]
    found = []
    for strategy in ("resident", "layerwise"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(sums(model, batches, strategy))
        (warning,) = [each for each in caught if issubclass(each.category, UserWarning)]
        assert "was never called: these data do not reach it" in str(warning.message)
        assert "% of the parameters in the model's matrices" in str(warning.message)
    assert_same(found[1], found[0])
    assert len(found[0]) == 14  # of two blocks
    assert {each.tokens for each in found[0].values()} == {sum(int(batch["attention_mask"].sum()) for batch in batches)}


@pytest.mark.filterwarnings("ignore:'all-linear' leaves out")
def test_null_spaces_and_the_automatic_strategy_take_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = tiny_multimodal("mllama"), random_batches(2, 3, 12)
    batches = [{**batch, "input_ids": batch["input_ids"] % IMAGE} for batch in batches]
    layerwise = compute_null_spaces(model, batches, rank=4, strategy="layerwise", progress=False)
    assert layerwise.keys() == compute_null_spaces(model, batches, rank=4, progress=False).keys()


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_layers_of_a_tower_that_are_asked_for_by_name_are_refused_at_the_first_batch_of_texts(strategy: str) -> None:
    model, calls = tiny_multimodal("qwen2_vl"), []
    ids = [{"input_ids": torch.randint(3, 59, (2, 9))} for _ in range(3)]
    model.model.language_model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    words = r"target 'model\.visual\.blocks\.0\.attn\.qkv' and 1 more was never called.*exclude='model\\\.visual\\\.\.\*'"
    with pytest.raises(ValueError, match=words):
        sums(model, ids, strategy, targets=["q_proj", "qkv"])
    assert len(calls) <= 4  # the first batch, which a layerwise run runs several times to check the blocks
    assert len(sums(model, ids, strategy, targets=["q_proj", "qkv"], exclude=r"model\.visual\..*")) == 2
    alone = samples("qwen2_vl", (7, 9))
    assert len(sums(model, [alone[1], alone[0]], "resident", targets=["q_proj", "qkv"])) == 4  # the second batch has an image


def test_a_tower_beside_the_text_can_be_a_target() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**sizes, "vocab_size": 64}, vision_config={**sizes, "image_size": 12, "patch_size": 4})
    ).eval()
    batches = [{"input_ids": torch.randint(3, 60, (3, 7)), "pixel_values": torch.randn(2, 3, 12, 12)} for _ in range(2)]
    assert_same(sums(model, batches, "layerwise"), sums(model, batches))
    only = r"vision_model\..*fc1"
    assert_same(sums(model, batches, "layerwise", targets=only), sums(model, batches, targets=only))


# ---- images and padding


@pytest.mark.filterwarnings("ignore:'all-linear' leaves out")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", list(MULTIMODAL))
def test_images_in_some_rows_and_padding_in_others(family: str, side: str) -> None:
    model, alone = tiny_multimodal(family), samples(family)
    expected = sums(model, alone)
    assert len(expected) > 20  # towers and projections too
    batch = collated(family, alone, side)
    assert not batch["attention_mask"].all()
    for strategy in ("resident", "layerwise"):
        assert_same(sums(model, [batch], strategy), expected)


def test_padding_inside_images_that_cannot_be_located_is_refused_by_name() -> None:
    model, alone = tiny_multimodal("mllama"), samples("mllama")
    batch = collated("mllama", alone, "left")
    batch["aspect_ratio_mask"][1, 0, 1] = 0  # its tower does not hide the second tile of this image from the first one
    batch["aspect_ratio_ids"][1] = 1
    for strategy in ("resident", "layerwise"):
        with pytest.raises(ValueError, match=r"^model\.vision_model\..*, batch 1: .* cannot be lined up with 'aspect_ratio_mask'"):
            sums(model, [batch], strategy)
    with pytest.raises(ValueError, match=r"^model\.language_model\.layers\.1\.cross_attn\.k_proj, batch 1: .*'aspect_ratio_mask'"):
        sums(model, [batch], targets=r".*cross_attn.*")
    assert len(sums(model, [batch], targets=r".*language_model\.layers\.[02]\.(self_attn|mlp).*")) == 14


def test_layers_on_which_the_loss_does_not_depend_leave_all_linear() -> None:
    model, alone = tiny_multimodal("llava"), samples("llava")
    for sample in (batch := collated("llava", alone, "right"), *alone):
        sample["labels"] = sample["input_ids"].masked_fill(sample["attention_mask"] == 0, -100)
    with pytest.warns(UserWarning, match=r"layers\.1\.self_attn\.\w+' .*has no gradient: the loss does not depend on it"):
        padded = gradient_covariances(model, [batch], progress=False)
    with pytest.warns(UserWarning, match="has no gradient"):
        expected = gradient_covariances(model, alone, progress=False)
    assert_same(dict(padded), dict(expected))
    assert "model.vision_tower.encoder.layers.0.mlp.fc1" in padded
    assert "model.vision_tower.encoder.layers.1.mlp.fc1" not in padded  # the projector takes what goes into this block
