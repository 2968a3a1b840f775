"""Stand-ins for linear layers of quantisation libraries: the names, packages, buffers and forward passes of their classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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
