"""What a sum of the kernels loses by rounding: the *resolution* of each variant, by which sums keep account of their error.

‖E‖_F / ‖G‖_F of the sum G + E of one launch, but for a part of E that moves no eigenvector (it is proportional to G). Two parts:

- `common`: tensor-core chains round toward zero, all the same way. That error has one sign in every launch: relative to the sum, it
  does not fall with the number of launches. It grows a little faster than the chain.
- `addition`: a float32 addition of a chain (`plain`) rounds to nearest, relative to the whole sum. n of them make √n times as much;
  from launch to launch they are independent, and relative to the sum fall like 1 / √launches.

The constants are an upper end: `common` is that of inputs with a few large and nearly constant channels (layer 1's down projection
in SmolLM2), for which all chains of an entry take the same way through the same roundings. Hopper's are what an H100 lost there,
2.0e-7 with windows of 128 (`benchmarks/results/first_gpu-h100/more.json`); other inputs lost 3e-8 to 1.1e-7. Ampere's, and the
power for shorter windows, are simulated (`python -m benchmarks.resolution`). On the tests' inputs the simulation of Hopper gave
what the H100 lost, to three digits. float32 inputs, which TF32 products stand for, have float32's own resolution.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch

from nullspace.csrc_triton.tiles import Tiling

Count = TypeVar("Count", float, torch.Tensor)


class Resolution(NamedTuple):
    """Relative errors (see the module), and by how many additions a launch sums its tokens."""

    common: float
    addition: float
    window: int
    splits: int

    def independent_square(self, tokens: Count) -> Count:
        """The square of the independent errors of a launch of so many tokens, relative to its energy."""
        return self.addition**2 * (tokens / self.window) / self.splits**2


# By compute capability (others round as Ampere does): a window, its `common`, and by what power of its length a longer chain loses
# more. On the H100 windows of 64, 256 and 512 lost 0.51, 2.4 and 5.6 times as much as those of 128.
COMMON = {(9, 0): (128, 2.05e-7, 1.25), (8, 0): (64, 2.25e-7, 1.16)}
# By what power a shorter one loses less.
SHORTER = 0.7
ADDITION = 1.6e-8
SINGLE = 2e-7


def resolution_of(tiling: Tiling, dtype: torch.dtype, device: torch.device, *, grouped: bool = False) -> Resolution:
    """The resolution of `syrk_accumulate`, or of `syrk_accumulate_grouped`, for a tiling and inputs of `dtype` on a device."""
    addition = ADDITION if tiling.in_triton().variant == "plain" else 0.0
    splits = 1 if grouped else tiling.splits
    if dtype == torch.float32:
        return Resolution(SINGLE, addition, tiling.window, splits)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    window, common, longer = COMMON.get(capability, COMMON[8, 0])
    length = tiling.window / window
    return Resolution(common * length ** (longer if length > 1 else SHORTER), addition, tiling.window, splits)
