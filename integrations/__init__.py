"""Thin layers over transformers and PEFT, each imported only by those who ask for it."""
