"""From data to an adapter that is ready to train, in one call.

`prepare` (`prepare`) takes a base model, `initialize_lora_nullspace_weights` (`initialize`) one that PEFT has wrapped already. What
both calibrate on, and how, is in `calibration`.
"""
