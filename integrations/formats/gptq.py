"""The Hessians of GPTQ (arXiv 2210.17323): H = 2 X Xᵀ / n of the input of every layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nullspace.artifacts.covariances import Covariances
from nullspace.integrations.formats.layers import with_tokens


def hessians(covariances: Covariances) -> Iterator[tuple[str, torch.Tensor]]:
    """H = 2 X Xᵀ / n of every layer, one at a time, n its tokens: what a running mean over batches gives, without its rounding.

    llm-compressor takes them as `hessians` of `llmcompressor.modifiers.gptq.gptq_quantize.quantize_weight` (0.14; before that
    `hessian`), and GPTQModel's `gptqmodel.quantization.gptq.GPTQ` uses its attribute `H`, if `nsamples` is set too. Neither has an
    argument for those of a whole model, whose blocks it quantises one after the other, each with the inputs that the quantised ones
    before it give; these are of the untouched model. llm-compressor divides by sequences in the place of tokens. The scale changes
    the loss that is reported and no quantised weight, since the damping is relative to the mean of the diagonal.

    Yields:
        (name, H): the module's name, and (d_in, d_in) float32, a new tensor, which may be changed in place.

    Raises:
        ValueError: naming the layer, if no token has reached it.
    """
    for name in covariances:
        covariance = with_tokens(covariances, name)
        yield name, (covariance.matrix() * (2 / covariance.mass)).to(torch.float32)
