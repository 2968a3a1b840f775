"""Which matrices of a model receive which inputs, and where their weights are."""
