"""What a sum of the kernels loses by rounding: the *resolution* of each variant, by which sums keep account of their error.

‖E‖_F / ‖G‖_F of the sum G + E of one launch, but for the part of E that is proportional to G and moves no eigenvector. Three parts:

- `common`: tensor-core chains round toward zero, all the same way. That error has one sign in every launch: relative to the sum, it
  does not fall with the number of launches. It grows a little faster than the chain.
- `chain`: what is random in the error of a chain, relative to the chain's own sum. Over n chains it falls like 1 / √n.
- `addition`: a float32 addition of a chain (`plain`) rounds to nearest, relative to the whole sum. n of them make √n times as much;
  from launch to launch they are independent, and relative to the sum fall like 1 / √launches.

The constants are an upper end of simulations, in which Kahan's pair added nothing to the error of the chains, as float64 would
(`python -m benchmarks.resolution`); none was measured on a device yet (`python -m benchmarks.first_gpu.kernels`). float32 inputs,
which TF32 products stand for, have float32's own resolution.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch

from nullspace.csrc_triton.tiles import Tiling

Count = TypeVar("Count", float, torch.Tensor)


class Resolution(NamedTuple):
    """Relative errors; see the module."""

    common: float
    chain: float
    addition: float
    window: int
    splits: int

    def independent_square(self, tokens: Count) -> Count:
        """The square of the independent errors of a launch of so many tokens, relative to its energy."""
        chains = tokens / self.window
        return self.chain**2 / chains + self.addition**2 * chains / self.splits**2


# By compute capability (others round as Ampere does): the window that the constants are of, `common` and `chain`.
CHAINS = {(9, 0): (128, 5e-8, 9e-8), (8, 0): (64, 5e-8, 9e-8)}
ADDITION = 2.5e-8
SINGLE = 2e-7


def resolution_of(tiling: Tiling, dtype: torch.dtype, device: torch.device, *, grouped: bool = False) -> Resolution:
    """The resolution of `syrk_accumulate`, or of `syrk_accumulate_grouped`, for a tiling and inputs of `dtype` on a device."""
    addition = ADDITION if tiling.in_triton().variant == "plain" else 0.0
    splits = 1 if grouped or tiling.variant == "gemm" else tiling.splits
    if dtype == torch.float32:
        return Resolution(SINGLE, 0.0, addition, tiling.window, splits)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    window, common, chain = CHAINS.get(capability, CHAINS[8, 0])
    longer = tiling.window / window
    return Resolution(common * longer * max(longer, 1.0) ** 0.3, chain * longer, addition, tiling.window, splits)
