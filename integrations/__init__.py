"""Thin layers over transformers and PEFT, and the formats of other projects; each is imported only where it is asked for."""
