"""`overlap`: O-LoRA's term of a live adapter, against the authors' loop over the parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guarded import adapted, rows

from models import tiny
from nullspace.integrations.peft import overlap, row_spaces


def authors(model: Any, earlier: str) -> torch.Tensor:
    """As `src/uie_trainer_lora.py` adds it: over all pairs of parameters of one module, in PEFT's names."""
    parameters = dict(model.named_parameters())
    return sum(  # type: ignore[return-value]
        torch.abs(torch.mm(parameters[name.replace("default", earlier)], each.T)).sum()
        for name, each in parameters.items()
        if "lora_A.default" in name
    )


def test_value_and_gradient_are_the_authors() -> None:
    model = adapted()
    model.add_adapter("first", model.peft_config["default"])
    earlier = rows(model, "first")
    apart = overlap(model, earlier)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # is not used
        found = apart()
    torch.testing.assert_close(found, authors(model, "first"))
    parameters = [p for name, p in model.named_parameters() if "lora_A.default" in name]
    ours, theirs = (torch.autograd.grad(value, parameters) for value in (found, authors(model, "first")))
    torch.testing.assert_close(ours, theirs)
    model.base_model.set_adapter(["first", "default"])
    torch.testing.assert_close(overlap(model, earlier, adapter_name="default")(), found)
    few = {name: each for name, each in row_spaces(model).items() if "q_proj" in name}  # of both, on some layers
    assert float(overlap(model, few, adapter_name="default")().detach()) > 0


def test_what_cannot_be_compared_is_refused_by_name() -> None:
    model = adapted()
    name, known = next(iter(rows(model).items()))
    for given, text in (
        ({}, "none of their layers has an adapter here"),
        ({"elsewhere": known}, "none of their layers .* like 'elsewhere'"),
        ({name: known[:, 1:]}, f"those of '{name}' should be"),
        ({name: known[0]}, f"those of '{name}' should be"),
    ):
        with pytest.raises(ValueError, match=text):
            overlap(model, given)
    with pytest.raises(TypeError, match="a PeftModel is needed"):
        overlap(tiny("llama"), rows(model))  # type: ignore[arg-type]
