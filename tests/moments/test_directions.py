"""Data that span too few directions, however many tokens they are: every method says so, once, with sites and numbers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.config import CordaConfig

from models import random_batches, tiny
from nullspace import Covariance, Covariances, NullSpaces, compute_null_spaces, solvers, stream_covariances
from nullspace.integrations.peft import METHODS, get_eva_state_dict, inject_adapters, preprocess_corda, write_init

R = 8
TARGETS = ["q_proj", "o_proj", "up_proj"]
# As batches: five tokens; one token 200 times, which position makes no other one before the first attention; and enough.
FEW = [{"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}]
EQUAL = [{"input_ids": torch.full((4, 50), 7)}]
MANY = random_batches(4, 8, 64)


def said(call: Callable[[], Any]) -> list[str]:
    """Warnings about directions or tokens."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [
        str(w.message)
        for w in caught
        if issubclass(w.category, UserWarning) and re.search("directions|fewer tokens", str(w.message))
    ]


def moments(batches: list[dict[str, torch.Tensor]]) -> Covariances:
    return Covariances(stream_covariances(tiny("llama"), batches, targets=TARGETS, precision="fp64", progress=False))


@pytest.fixture(scope="module")
def of() -> dict[str, Covariances]:
    return {"few": moments(FEW), "equal": moments(EQUAL), "many": moments(MANY)}


@pytest.mark.parametrize(
    ("door", "method"),
    [
        *(("inject", method) for method in METHODS if METHODS[method].needs),
        *(("write", method) for method in ("corda-kpm", "eva")),
    ],
)
def test_every_method_names_layers_and_numbers_once(door: str, method: str, of: dict[str, Covariances], tmp_path: Path) -> None:
    def start(data: str, preserve: str = "many") -> None:
        options: dict[str, Any] = {"method": method, "covariances": of[data]}
        if "preserve" in METHODS[method].needs:
            options["preserve"] = of[preserve]
        if door == "inject":
            inject_adapters(tiny("llama"), LoraConfig(r=R, target_modules=TARGETS), **options)
        else:
            out = tmp_path / f"{data}-{preserve}"
            write_init(out, tiny("llama"), LoraConfig(r=R, target_modules=TARGETS), progress=False, **options)

    (few,) = said(lambda: start("few"))
    assert "layers.0.self_attn.q_proj" in few
    assert re.search(r"\(5\)|\(5 of 48 directions, \d+ needed\)", few)
    (equal,) = said(lambda: start("equal"))
    spanned = 0 if method == "eva" else 1
    needed = {"corda-kpm": 40, "corda-exact": 40, "mica-data": 40, "lora-null": 40, "b-zero": 40}.get(method, R)
    assert re.search(
        rf"9 of 9 (layers|sites) .*layers\.0\.self_attn\.q_proj \({spanned} of 48 directions, {needed} needed\)", equal
    )
    assert said(lambda: start("many")) == []
    if "preserve" in METHODS[method].needs:  # contrast has ε where what is kept has no directions, and inflora is free there
        assert len(said(lambda: start("many", "equal"))) == (method not in ("contrast", "inflora"))


def test_a_calibration_counts_directions_beside_tokens(of: dict[str, Covariances]) -> None:
    (text,) = said(lambda: compute_null_spaces(tiny("llama"), EQUAL, rank=R, targets=TARGETS, progress=False))
    assert re.search(r"9 of 9 layers .*a null space needs: model\.layers\.0\.self_attn\.q_proj \(\d+ of 48", text)
    (text,) = said(lambda: compute_null_spaces(tiny("llama"), FEW, rank=R, targets=TARGETS, progress=False))
    assert "9 of 9 sites saw fewer tokens (5)" in text
    (text,) = said(lambda: NullSpaces.from_covariances(of["equal"], rank=R, progress=False))
    assert "directions" in text
    assert said(lambda: compute_null_spaces(tiny("llama"), MANY, rank=R, targets=TARGETS, progress=False)) == []


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_preprocess_corda_counts_them_too(mode: str, tmp_path: Path) -> None:
    def run(batches: list[dict[str, torch.Tensor]], file: Path | None = None) -> list[str]:
        model = tiny("llama")
        options = CordaConfig(corda_method=mode, covariance_file=None if file is None else str(file))  # type: ignore[arg-type]
        config = LoraConfig(r=R, target_modules=TARGETS, init_lora_weights="corda", corda_config=options)
        return said(lambda: preprocess_corda(model, config, run_model=lambda: [model(**batch) for batch in batches]))

    assert len(run(FEW)) == 1
    file = tmp_path / "sums.pt"
    for _ in ("summed", "read"):
        (text,) = run(EQUAL, file)
        assert f"layers.0.self_attn.q_proj (1 of 48 directions, {40 if mode == 'kpm' else R} needed)" in text
    assert run(MANY) == []


def test_eva_names_layers_that_get_more_components_than_there_are() -> None:
    config = LoraConfig(r=R, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    texts = [{"input_ids": torch.tensor([[5, 6, 7]] * 20), "attention_mask": torch.ones(20, 3)}]  # nine directions in no layer
    (text,) = said(lambda: get_eva_state_dict(tiny("llama"), texts, config, show_progress_bar=False))
    assert (
        "9 of 9 layers span fewer directions than EVA needs: model.layers.0.self_attn.q_proj (2 of 48 directions, 8 needed)" in text
    )
    assert said(lambda: get_eva_state_dict(tiny("llama"), MANY, config, show_progress_bar=False)) == []


@pytest.mark.parametrize("rank", [0, 1, 7, 29, 30])
@pytest.mark.parametrize("precision", ["mixed", "fp64", "qr"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_rank_of_a_sum_is_that_of_its_data(rank: int, precision: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(900, rank, generator=generator) @ torch.randn(rank, 30, generator=generator) * scale
    covariance = Covariance(30, precision=precision)
    covariance.update(x.double() if rank < 30 else x)
    noise = covariance.error_norm ** (2 if precision == "qr" else 1)
    certain, possible = solvers.numerical_rank(covariance.matrix(), noise)
    assert certain == rank
    assert possible == rank or precision == "mixed"
    for enough in range(31):
        assert solvers.numerical_rank(covariance.matrix(), noise, enough=enough)[0] == min(rank, enough)
