"""Second moments as ROME and MEMIT keep them, and AlphaEdit reads them (arXiv 2202.05262, 2210.07229, 2410.02355).

One file a layer, STATS/MODEL/DATASET_stats/LAYER_float32_mom2_SAMPLES.npz, of NumPy arrays without pickles:

- `mom2.mom2`: (d_in, d_in) float32, Σ k kᵀ over tokens, not divided by anything. K, the keys, is the input of the layer that is
  edited, the last one of an MLP: the X of this package, in the same order of its entries. As the matrix is symmetric, nothing is
  transposed for a `Conv1D` either.
- `mom2.count`: the number of tokens, by which they divide.
- `mom2.constructor`: the name of their class.
- `sample_size`: the number of texts. Their reader compares it with `mom2_n_samples` of the hyperparameters, and computes the
  statistics again if the two differ. It is used for nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from nullspace.artifacts import store
from nullspace.artifacts.covariances import Covariances
from nullspace.checks import check_integer, is_plain_name
from nullspace.errors import InputError
from nullspace.integrations.formats.layers import check_layers, with_tokens

FILE = "{model}/{dataset}_stats/{layer}_float32_mom2_{samples}.npz"
CONSTRUCTOR = "util.runningstats.SecondMoment()"


def write_memit(
    covariances: Covariances,
    stats: str | os.PathLike[str],
    *,
    model: str,
    layers: Sequence[str],
    dataset: str = "wikipedia",
    samples: int = 100_000,
    overwrite: bool = False,
) -> list[Path]:
    """Write the second moments of some layers where ROME, MEMIT and AlphaEdit look for their statistics.

    In a process group, call it in one process.

    Args:
        covariances: of the text whose knowledge edits are to keep, from the untouched model.
        stats: their `STATS_DIR`, `data/stats` of their `globals.yml`.
        model: the folder in it. ROME and MEMIT take the hub name with `_` for `/`, AlphaEdit what follows the last `/`.
        layers: those that are edited, as `rewrite_module_tmp` of the hyperparameters names them.
        dataset: `mom2_dataset` of the hyperparameters.
        samples: `mom2_n_samples` of the hyperparameters, whatever the number of texts was.
        overwrite: replace files that are there.

    Returns:
        The files, in the order of the layers. Each is written whole or not at all.

    Raises:
        ValueError: naming it, for a layer without a second moment or without a token, a name that is no file's, values beyond the
            range of float32.
        FileExistsError: if a file is there.
        OSError: if one cannot be written.
    """
    check_integer("samples", samples)
    for what, name in (("model", model), ("dataset", dataset)):
        if not is_plain_name(name):
            raise InputError(f"{what} names a folder in {stats} and cannot be {name!r}: write '_' for '/'")
    files = {
        name: Path(stats, FILE.format(model=model, dataset=dataset, layer=name, samples=samples))
        for name in check_layers(covariances, layers)
    }
    for file in files.values():
        store.check_free(file, Path.is_file, overwrite=overwrite)
    for name, file in files.items():
        covariance = with_tokens(covariances, name)
        # Tokens that were weighted count by their weights in their mean too.
        mom2 = (covariance.matrix() * (covariance.tokens / covariance.mass)).to("cpu", torch.float32)
        if not bool(mom2.isfinite().all()):
            raise InputError(f"the second moment of {name!r} is beyond the range of float32")
        arrays = {"mom2.constructor": np.array(CONSTRUCTOR), "mom2.count": np.array(covariance.tokens), "mom2.mom2": mom2.numpy()}
        with store.new_file(file, overwritable=Path.is_file, overwrite=overwrite) as part, part.open("wb") as stream:
            np.savez(stream, **arrays, sample_size=np.array(samples))  # type: ignore[arg-type]
    return list(files.values())
