"""The account of rounding against simulations of it: never below what was lost, and not far above what real inputs lose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tensor_core
from inputs import activations
from nullspace.csrc_triton.resolution import Resolution, resolution_of
from nullspace.csrc_triton.tiles import HALF, SINGLE
from reference import second_moment

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "resolution-simulated.json"
CAPABILITIES = {"Hopper": (9, 0), "Ampere": (8, 0)}


@pytest.fixture
def resolution_on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The resolution of the table's tiling, changed, on a device of a capability."""

    def on(capability: tuple[int, int], dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Resolution:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return resolution_of(HALF[capability][1]._replace(**changes), dtype, torch.device("cuda", 0))

    return on


def account(lost: Resolution, tokens: int, launches: int) -> float:
    """What launches of equal energy lose together, relative to it: as `GramSums.error_norm` adds it up."""
    return lost.common + (lost.independent_square(tokens) / launches) ** 0.5


def test_the_account_covers_what_was_simulated_and_little_more(resolution_on: Any) -> None:
    rows = json.loads(RESULT.read_text())["rows"]
    assert {row["launches"] for row in rows} >= {1, 4, 16, 32}
    ratios = {}
    for row in rows:
        lost = resolution_on(CAPABILITIES[row["core"]], variant=row["variant"], window=row["window"])
        ratio = account(lost, row["tokens"], row["launches"]) / row["rest"]
        ratios[tuple(row[key] for key in ("core", "input", "variant", "window", "tokens", "launches"))] = ratio
    assert min(ratios.values()) >= 1.0, min(ratios, key=ratios.__getitem__)
    # Of Gaussian inputs no entry's chains take the same way through the roundings: nearly nothing of their error is common.
    others = {key: ratio for key, ratio in ratios.items() if key[1] != "random"}
    assert max(others.values()) <= 15.0, max(others, key=others.__getitem__)
    # The tightest of the inputs, at each tiling.
    by_tiling: dict[Any, float] = {}
    for (core, _, variant, window, *_), ratio in ratios.items():
        by_tiling[core, variant, window] = min(ratio, by_tiling.get((core, variant, window), np.inf))
    assert max(by_tiling.values()) <= 2.0, by_tiling


def test_the_account_falls_with_launches_as_the_error_does(resolution_on: Any) -> None:
    kahan, plain = (resolution_on((9, 0), variant=variant) for variant in ("kahan", "plain"))
    assert account(kahan, 8192, 32) == account(kahan, 8192, 1)  # a bias
    assert account(plain, 8192, 1) >= 1.5 * account(kahan, 8192, 1)
    assert account(plain, 8192, 32) <= 1.2 * account(kahan, 8192, 32)  # random
    assert plain.independent_square(8192) > plain.independent_square(1024)  # more additions a launch lose more
    # Gluon's sums are those of Triton, and float64 adds as exactly as Kahan's pair.
    for variant, same in (("gluon-kahan", kahan), ("gluon-plain", plain), ("gemm", kahan)):
        assert resolution_on((9, 0), variant=variant) == same
    shorter, same, longer = (resolution_on((9, 0), window=window).common for window in (64, 128, 512))
    assert shorter < same
    assert longer > 4 * same


def test_tokens_that_programs_share_are_added_less_often(resolution_on: Any) -> None:
    whole, split = (resolution_on((9, 0), variant="plain", splits=splits) for splits in (1, 4))
    assert split.independent_square(8192) < whole.independent_square(8192)
    grouped = resolution_of(HALF[9, 0][1]._replace(splits=4), torch.bfloat16, torch.device("cpu"), grouped=True)
    assert grouped.splits == 1


def test_float32_inputs_have_their_own(resolution_on: Any) -> None:
    lost = resolution_of(SINGLE, torch.float32, torch.device("cpu"))
    assert 1e-7 <= lost.common <= 3e-7
    assert lost.independent_square(8192) == 0.0


@pytest.mark.interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, nothing is interpreted")
@pytest.mark.parametrize("variant", ["kahan", "plain"])
def test_sums_know_what_rounding_toward_zero_costs_them(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`error_norm` of running sums, of several launches, whose products round as Ampere's tensor cores do."""
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    from nullspace.csrc_triton import tiles
    from nullspace.moments.sums_triton import TritonSums

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.data.dtype == np.float64:
            return interpreter.TensorHandle(a.data @ b.data + d.data, d.dtype.scalar)
        return interpreter.TensorHandle(tensor_core.AMPERE.dot(a.data, b.data, d.data), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setitem(tiles.HALF_DEFAULT, 1, tiles.HALF_DEFAULT[1]._replace(block=64, warps=4, variant=variant))
    x = activations(2 * 512, 24, quietest=1e-2).bfloat16()
    sums = TritonSums(24, torch.device("cpu"))
    for part in x.split(300):
        sums.add(part, None)
    sums.flush()
    exact = second_moment(x)
    error = sums.square() - exact
    rest = error - (error * exact).sum() / exact.square().sum() * exact
    assert float(rest.norm()) <= sums.error_norm <= 20 * float(rest.norm())
