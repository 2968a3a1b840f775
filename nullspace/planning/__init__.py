"""Forecasts: memory, time and the strategy that fits, before a model is run."""
