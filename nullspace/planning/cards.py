"""GPUs by name, for forecasts: what their data sheets say, and what a forecast assumes that they reach.

`CARDS` is the only table. Its columns are figures of data sheets. Rates are assumed to grow with them from those of the H100, which
were measured (`benchmarks/results/first_gpu-h100`); no other card was.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from nullspace.errors import InputError


class Card(NamedTuple):
    """A GPU as its data sheet describes it.

    Attributes:
        memory: bytes, 10⁹ a GB.
        half: flops a second of dense 16-bit products that are summed in float32, by tensor cores.
        single, double: flops a second in float32 and float64, without tensor cores.
        bandwidth: bytes a second of its memory.
        link: bytes a second from the host, one way.
        note: what a user of this card should know.
    """

    memory: float
    half: float
    single: float
    double: float
    bandwidth: float
    link: float
    note: str = ""


PCIE3, PCIE4, PCIE5 = 16e9, 32e9, 64e9
_NO_BF16 = "This card has no bfloat16 products: use --dtype float16."
_NOT_TRIED = "This card needs ROCm, on which nothing of nullspace has run."

CARDS: dict[str, Card] = {
    "T4": Card(16e9, 65e12, 8.1e12, 0.25e12, 320e9, PCIE3, _NO_BF16),
    "L4": Card(24e9, 121e12, 30.3e12, 0.47e12, 300e9, PCIE4),
    "A10G": Card(24e9, 70e12, 35e12, 0.55e12, 600e9, PCIE4),
    "RTX 3090": Card(24e9, 71e12, 35.6e12, 0.56e12, 936e9, PCIE4),
    "RTX 4090": Card(24e9, 165e12, 82.6e12, 1.29e12, 1008e9, PCIE4),
    "RTX 5090": Card(32e9, 210e12, 104.8e12, 1.64e12, 1792e9, PCIE5),
    "A100-40GB": Card(40e9, 312e12, 19.5e12, 9.7e12, 1555e9, PCIE4),
    "RTX A6000": Card(48e9, 155e12, 38.7e12, 0.6e12, 768e9, PCIE4),
    "L40S": Card(48e9, 362e12, 91.6e12, 1.43e12, 864e9, PCIE4),
    "A100-80GB": Card(80e9, 312e12, 19.5e12, 9.7e12, 2039e9, PCIE4),
    "H100": Card(80e9, 989e12, 67e12, 34e12, 3350e9, PCIE5),
    "H200": Card(141e9, 989e12, 67e12, 34e12, 4800e9, PCIE5),
    "MI300X": Card(192e9, 1307e12, 163e12, 81.7e12, 5300e9, PCIE5, _NOT_TRIED),
}
"""Name → figures, by memory. Of several forms of a card the SXM module's; sparsity, which doubles some figures, is left out.

Where they come from, by the title of the publication; a maker's figure with sparsity is halved here:

- T4: NVIDIA T4 data sheet; double: 1/32 of single (Turing architecture white paper).
- L4, L40S: NVIDIA L4 and L40S data sheets. RTX 4090: NVIDIA Ada GPU architecture white paper, appendix A, FP16 products with FP32
  accumulation. Double: 1/64 of single (the same white paper).
- A10G: NVIDIA A10G data sheet, as Amazon Web Services publish it for G5 instances. RTX A6000: its data sheet. RTX 3090: NVIDIA
  Ampere GA102 GPU architecture white paper, FP16 products with FP32 accumulation. Double: 1/64 of single (the same white paper).
- RTX 5090: NVIDIA RTX Blackwell GPU architecture white paper, appendix A, FP16 products with FP32 accumulation; double as above.
- A100: NVIDIA A100 Tensor Core GPU data sheet (40 GB: the white paper of the architecture). H100, H200: their data sheets.
- MI300X: AMD Instinct MI300X data sheet.
- link: what 16 lanes of the card's PCIe generation carry one way, before the overhead of packets.
"""

REFERENCE = CARDS["H100"]
"""The card whose rates were measured: those of the others are in proportion to it."""
OF_DOUBLE = 0.5
"""Part of its float64 peak that an eigenproblem can reach at most: it binds where that peak is low."""


def card(name: str) -> tuple[str, Card]:
    """A card and its name in `CARDS`; case, spaces, hyphens and the maker's name do not count, and a part is enough (`"4090"`).

    Raises:
        ValueError: if it is none of `CARDS`, or a part of several names.
    """
    wanted = _plain(name)
    exact = [each for each in CARDS if _plain(each) == wanted]
    several = exact or [each for each in CARDS if wanted and wanted in _plain(each)]
    if len(several) == 1:
        return several[0], CARDS[several[0]]
    if several:
        raise InputError(f"{name!r} may be {' or '.join(several)}: give the whole name")
    raise InputError(f"{name!r} is none of {', '.join(CARDS)}: for another card, give its memory (--device-memory 16GB)")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]|nvidia|geforce|tesla|amd|instinct|gpu", "", name.lower())
