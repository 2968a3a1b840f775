"""What is no number that an argument takes is refused at once, by the argument's name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import RANK, covariances_for, spaces_for
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig, EvaConfig

from models import random_batches, tiny
from nullspace import Covariance, NullSpace, NullSpaces, compute_covariances, compute_null_spaces, factors, solvers
from nullspace.calibration.stream import stream_covariances
from nullspace.checks import check_device
from nullspace.integrations.peft import inject_adapters, write_init
from nullspace.integrations.peft.corda import preprocess_corda
from nullspace.integrations.peft.eva import get_eva_state_dict
from nullspace.integrations.transformers import PackedBatches, load_model
from nullspace.planning import plan

W, C = torch.randn(12, 10, dtype=torch.float64), torch.eye(10, dtype=torch.float64)


class Untouched:
    """A loader, or a `run_model`, that nobody may ask for anything."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the data were read")

    def __call__(self) -> None:
        raise AssertionError("the model was run")


def covariance() -> Covariance:
    found = Covariance(10)
    found.update(torch.randn(40, 10))
    return found


RANKED: dict[str, Callable[[Any], Any]] = {
    "compute_null_spaces": lambda r: compute_null_spaces(tiny("llama"), Untouched(), rank=r, progress=False),
    "NullSpace.from_covariance": lambda r: NullSpace.from_covariance(covariance(), r),
    "NullSpaces.from_covariances": lambda r: NullSpaces.from_covariances(covariances_for("llama"), rank=r, progress=False),
    "factors.lora_null": lambda r: factors.lora_null(W, C[:, :8], rank=r),
    "factors.b_zero": lambda r: factors.b_zero(C[:, :8], 12, rank=r),
    "factors.pissa": lambda r: factors.pissa(W, rank=r),
    "factors.milora": lambda r: factors.milora(W, rank=r),
    "factors.corda": lambda r: factors.corda(W, C, rank=r),
    "factors.corda_exact": lambda r: factors.corda_exact(W, C, rank=r),
    "factors.sc_lora": lambda r: factors.sc_lora(W, C, C, rank=r),
    "factors.eva": lambda r: factors.eva(C, C[0], 4.0, 12, rank=r),
    "factors.orthogonal": lambda r: factors.orthogonal(10, 12, rank=r),
    "plan.Workload": lambda r: plan.Workload(rank=r),
}
COUNTED: dict[str, Callable[[Any], Any]] = {
    "bottom_eigenpairs": lambda k: solvers.bottom_eigenpairs(C, k),
    "top_eigenpairs": lambda k: solvers.top_eigenpairs(C, k),
    "bottom_right_singular": lambda k: solvers.bottom_right_singular(C, k),
    "left_singular": lambda k: solvers.left_singular(W, k),
}
NO_INTEGERS = [4.0, True, "8", np.float64(4), torch.tensor(4), [4]]


@pytest.mark.parametrize("function", RANKED)
@pytest.mark.parametrize("rank", NO_INTEGERS, ids=repr)
def test_a_rank_that_is_no_integer_is_refused_by_name(function: str, rank: Any) -> None:
    with pytest.raises(TypeError, match="rank must be an integer, not "):
        RANKED[function](rank)


@pytest.mark.parametrize("function", COUNTED)
@pytest.mark.parametrize("k", [*NO_INTEGERS, None], ids=repr)
def test_a_number_of_eigenpairs_that_is_no_integer_is_refused_by_name(function: str, k: Any) -> None:
    with pytest.raises(TypeError, match="k must be an integer, not "):
        COUNTED[function](k)


@pytest.mark.parametrize("function", [name for name in RANKED if name != "compute_null_spaces"])
def test_numpys_integers_are_integers(function: str) -> None:
    RANKED[function](np.int64(4))


def test_a_rank_of_numpys_can_be_kept_in_a_checkpoint(tmp_path: Path) -> None:
    spaces = compute_null_spaces(tiny("llama"), random_batches(2), rank=np.int32(4), checkpoint=tmp_path / "c", progress=False)
    spaces.save(tmp_path / "s")
    assert {space.rank for space in NullSpaces.load(tmp_path / "s").values()} == {4}


@pytest.mark.parametrize("name", ["samples", "length", "batch_size"])
@pytest.mark.parametrize("value", [2.0, True, "2", None], ids=repr)
def test_sizes_of_data_are_integers(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer"):
        plan.Workload(**{name: value})
    with pytest.raises(TypeError, match=f"{name} must be an integer"):
        PackedBatches(Untouched(), None, **{name: value})


BAD_NUMBERS = [float("nan"), float("inf"), -float("inf"), -4, "1", True, None]


@pytest.mark.parametrize("value", [0, *BAD_NUMBERS], ids=repr)
@pytest.mark.parametrize("write", [False, True], ids=["inject_adapters", "write_init"])
@pytest.mark.parametrize("method", ["lora-null", "b-zero"])
def test_an_alpha_that_gives_no_scaling_is_refused_and_the_model_is_as_it_was(
    value: Any, write: bool, method: str, tmp_path: Path
) -> None:
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for where, options in {
        "lora_alpha": {"lora_alpha": value},
        r"alpha_pattern\['q_proj'\]": {"lora_alpha": 8, "alpha_pattern": {"q_proj": value}},
    }.items():
        config = LoraConfig(r=RANK, target_modules=["q_proj", "down_proj"], **options)
        make = functools.partial(write_init, tmp_path / "out", progress=False) if write else inject_adapters
        with pytest.raises((TypeError, ValueError), match=rf"LoraConfig\.{where} must be a"):
            make(model, config, spaces_for("llama"), method=method)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [4.0, True, 0, -1, "4", 4.5], ids=repr)
def test_a_rank_of_the_configuration_is_an_integer(value: Any) -> None:
    for where, options in {"r": {}, r"rank_pattern\['q_proj'\]": {"rank_pattern": {"q_proj": value}}}.items():
        config = LoraConfig(r=RANK, target_modules=["q_proj"], corda_config=CordaConfig(), eva_config=EvaConfig(), **options)
        if where == "r":
            config.r = value  # PEFT looks at some of it when the configuration is made
        with pytest.raises((TypeError, ValueError), match=rf"LoraConfig\.{where} must be "):
            inject_adapters(tiny("llama"), config, spaces_for("llama"))
        with pytest.raises((TypeError, ValueError), match=rf"LoraConfig\.{where} must be "):
            preprocess_corda(tiny("llama"), config, run_model=Untouched())
        config.init_lora_weights = "eva"
        with pytest.raises((TypeError, ValueError), match=rf"LoraConfig\.{where} must be "):
            get_eva_state_dict(tiny("llama"), Untouched(), peft_config=config)


@pytest.mark.parametrize(
    ("name", "method", "bad"),
    [
        ("sigma_scale", "lora-null", [0, *BAD_NUMBERS]),
        ("beta", "sc-lora", [1.5, *BAD_NUMBERS]),
        ("damping", "corda-kpm", BAD_NUMBERS),
        ("damping", "contrast", [0.0, *BAD_NUMBERS]),
        ("share", "inflora", [1.5, *BAD_NUMBERS]),
        ("split", "lora-null", [0, *BAD_NUMBERS]),
    ],
)
def test_the_numbers_of_methods_are_checked_before_what_they_are_used_on(name: str, method: str, bad: list[Any]) -> None:
    for value in bad:
        with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
            inject_adapters(tiny("llama"), LoraConfig(), method=method, **{name: value})


@pytest.mark.parametrize("value", [float("nan"), -1.0, "1", True], ids=repr)
def test_a_tolerance_is_a_number(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="tolerance must be a"):
        compute_null_spaces(tiny("llama"), Untouched(), rank=4, tolerance=value, progress=False)


def test_a_device_without_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs: the message is PyTorch's."""
    known = torch.empty

    def empty(*sizes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if device.type == "mps" and dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        return known(*sizes, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(ValueError, match=r"device 'mps' cannot be used here: .*float64\. Give 'cpu'"):
        check_device("mps")


@pytest.mark.parametrize("device", ["tpu", "", "cuda:99", "meta", "hpu"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str, tmp_path: Path) -> None:
    def refused() -> Any:
        return pytest.raises(ValueError, match=f"device '{device}' cannot be used here")

    with refused():
        check_device(device)
    with refused():
        load_model("no-such-model", device=device)
    with refused():
        list(stream_covariances(tiny("llama"), Untouched(), strategy="layerwise", device=device, progress=False))
    with refused():
        compute_null_spaces(tiny("llama"), Untouched(), rank=4, strategy="layerwise", device=device, progress=False)
    with refused():
        compute_covariances(tiny("llama"), Untouched(), tmp_path / "out", strategy="layerwise", device=device, progress=False)
