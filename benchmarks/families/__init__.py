"""Every architecture of transformers that can be built small, from its configuration class: what nullspace can do with it."""
