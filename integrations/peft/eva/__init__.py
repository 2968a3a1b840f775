"""EVA (Paischer et al., arXiv 2410.07170) from exact second moments, behind PEFT's own two functions.

    from nullspace.integrations.peft import get_eva_state_dict, initialize_lora_eva_weights  # instead of: from peft import …

A = the top right singular vectors of a layer's *centred* inputs, B = 0, and the ranks go to the layers where they explain most
variance. The base stays as it is, so it may be quantised.

Differences from PEFT: it reads the data repeatedly, updates an approximate SVD in float32 batch by batch, and stops when the
vectors turn by less than `EvaConfig.tau` from one batch to the next. Here the data are read once, every token counts the same, and
the components are those of all tokens together, whatever the size and order of the batches. Small data are read to their end; a
long loader, until the components agree with those of half the data, to `tau`. The price is memory: 4 · d_in² bytes for each input
of the model, on the device of the layer, until the pass is over.

The functions are in `initialize`, what is summed in `inputs`, the principal components in `components`.
"""

from nullspace.integrations.peft.eva.initialize import get_eva_state_dict, initialize_lora_eva_weights

__all__ = ["get_eva_state_dict", "initialize_lora_eva_weights"]
