"""Encoder–decoder models with padded batches: the encoder's mask and the decoder's, each for the layers that its texts reach."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from nullspace import Covariance, stream_covariances
from nullspace.planning.forecast import forecast
from nullspace.planning.plan import Workload
from reference import relative_error

E: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
BART: dict[str, Any] = {
    **E,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
}
T5: dict[str, Any] = {
    **{**E, "decoder_start_token_id": 1},
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
}


def _led() -> nn.Module:
    """It pads its encoder's input itself, to a multiple of the window."""
    sizes = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    return transformers.LEDForConditionalGeneration(transformers.LEDConfig(**BART, **sizes, attention_window=8))


def _fsmt() -> nn.Module:
    """Tokens come before sequences, and its blocks carry no mark of transformers'."""
    sizes = {name: value for name, value in BART.items() if name != "vocab_size"}
    vocabularies = {"langs": ["en", "de"], "src_vocab_size": 64, "tgt_vocab_size": 64}
    return transformers.FSMTForConditionalGeneration(transformers.FSMTConfig(**sizes, **vocabularies))


def _whisper() -> nn.Module:
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**BART, **sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART, max_position_embeddings=64)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "umt5": lambda: transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**T5)),
    "led": _led,
    "fsmt": _fsmt,
    "whisper": _whisper,
}


@functools.cache
def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[family]().eval()


def sums(model: nn.Module, loader: Any, strategy: str = "resident", **options: Any) -> dict[str, Covariance]:
    found = stream_covariances(model, loader, strategy=strategy, precision="fp64", progress=False, **options)
    return {member: covariance for site, covariance in found for member in site.members}


def assert_same(found: dict[str, Covariance], expected: dict[str, Covariance]) -> None:
    assert found.keys() == expected.keys()
    for name, covariance in expected.items():
        assert found[name].tokens == covariance.tokens, name
        assert relative_error(found[name].matrix(), covariance.matrix()) < 1e-5, name


def texts(seed: int, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str = "right", value: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and their mask."""
    length = max(map(len, rows))
    sides = [(length - len(row), 0) if side == "left" else (0, length - len(row)) for row in rows]
    ids = torch.stack([nn.functional.pad(row, lack, value=value) for row, lack in zip(rows, sides, strict=True)])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), lack) for row, lack in zip(rows, sides, strict=True)])
    return ids, mask


SOURCES, LABELS = texts(1, (7, 11, 9)), texts(2, (11, 5, 8))  # as many tokens in the encoder as in the decoder


def of_labels(side: str = "right") -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A batch whose decoder's inputs are made of labels, and its samples."""
    ids, mask = padded(SOURCES, side)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": padded(LABELS, value=-100)[0]}
    return batch, [{"input_ids": ids[None], "labels": labels[None]} for ids, labels in zip(SOURCES, LABELS, strict=True)]


def of_masks(side: str = "right") -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A batch with a mask for both, and its samples."""
    ids, mask = padded(SOURCES, side)
    decoder_ids, decoder_mask = padded(LABELS)
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask}
    alone = [{"input_ids": ids[None], "decoder_input_ids": decoder[None]} for ids, decoder in zip(SOURCES, LABELS, strict=True)]
    return batch, alone


@pytest.mark.parametrize(
    ("family", "batches"),
    [
        ("bart", of_labels()),
        ("bart", of_masks()),
        ("t5", of_labels()),
        ("umt5", of_masks("left")),
        ("led", of_labels()),
        ("fsmt", of_masks()),
    ],
)
@pytest.mark.filterwarnings("ignore:'all-linear' leaves out")
def test_padding_of_both_texts_is_left_out(family: str, batches: tuple[Any, list[Any]]) -> None:
    model, (batch, alone) = model_of(family), batches
    expected = sums(model, alone)
    tokens = {name: covariance.tokens for name, covariance in expected.items()}
    keys = {tokens[n] for n in tokens if n.endswith(("encoder_attn.k_proj", "EncDecAttention.k"))}
    assert keys == {27}
    assert {tokens[n] for n in tokens if "decoder" in n and n.endswith(("fc1", "encoder_attn.q_proj", ".wi", ".wi_0"))} == {24}
    assert_same(sums(model, [batch]), expected)
    if family == "t5":  # its first block makes the bias that the others add
        with pytest.raises(ValueError, match=r"layerwise.*T5ForConditionalGeneration.*decoder\.block\.1"):
            sums(model, [batch], "layerwise")
    else:
        assert_same(sums(model, [batch], "layerwise"), expected)


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_sounds_have_their_frames_and_labels_their_padding(strategy: str) -> None:
    sounds, labels = torch.randn(3, 8, 40), padded(LABELS, value=-100)[0]
    alone = [{"input_features": sound[None], "labels": label[None]} for sound, label in zip(sounds, LABELS, strict=True)]
    with pytest.warns(UserWarning, match="Conv1d"):
        expected = sums(model_of("whisper"), alone)
    with pytest.warns(UserWarning, match="Conv1d"):
        assert_same(sums(model_of("whisper"), [{"input_features": sounds, "labels": labels}], strategy), expected)
    assert {covariance.tokens for covariance in expected.values()} == {24, 60}


def test_a_decoder_that_repeats_the_encoders_text_has_its_padding() -> None:
    (batch, alone), model = of_labels(), model_of("bart")
    batch = {name: value for name, value in batch.items() if name != "labels"}
    assert_same(sums(model, [batch]), sums(model, [{"input_ids": sample["input_ids"]} for sample in alone]))
    left = dict(zip(("input_ids", "attention_mask"), padded(SOURCES, "left"), strict=True))
    with (
        pytest.warns(UserWarning, match="padded on the left"),
        pytest.raises(
            ValueError,
            match=r"^model\.decoder\..*, batch 1: .*made of tokens with padding on the left: give decoder_attention_mask",
        ),
    ):
        sums(model, [left])


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_what_the_model_raises_for_its_inputs_names_the_batch(strategy: str) -> None:
    words = r"^batch 1: UMT5ForConditionalGeneration cannot be run on input_ids \(1, 7\).*give batches with 'labels' or 'decoder_"
    with pytest.raises(ValueError, match=words):
        sums(model_of("umt5"), [{"input_ids": SOURCES[0][None]}], strategy)
    with pytest.raises(
        ValueError, match=r"^batch 1: WhisperForConditionalGeneration .*AttributeError.*batches that its forward takes"
    ):
        sums(model_of("whisper"), [{"decoder_input_ids": SOURCES[0][None]}], strategy)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_forecast_offers_no_layerwise_run_where_the_blocks_are_linked_otherwise(family: str) -> None:
    strategies = {plan.strategy for plan in forecast(model_of(family), Workload(rank=4, length=32))}
    assert strategies == ({"resident", "layerwise"} if family == "bart" else {"resident"})


def test_labels_that_begin_with_ignored_ones_leave_doubts() -> None:
    model, (batch, _) = model_of("bart"), of_labels()
    labels = batch["labels"].clone()
    labels[1, 0] = -100
    with pytest.raises(
        ValueError, match=r"^model\.decoder\..*, batch 1: .*labels that begin with -100: give decoder_attention_mask"
    ):
        sums(model, [{**batch, "labels": labels}])
    prompted = of_masks()[0]
    named = {"decoder_input_ids": prompted["decoder_input_ids"], "labels": labels}  # the labels of a prompt
    assert sums(model, [{**batch, **named}])["model.decoder.layers.0.fc1"].tokens == 24
