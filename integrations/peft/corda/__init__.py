"""CorDA behind PEFT's own function, `preprocess_corda`: the function (`preprocess`), and its two files (`files`)."""

from nullspace.integrations.peft.corda.preprocess import preprocess_corda

__all__ = ["preprocess_corda"]
