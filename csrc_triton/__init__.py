"""Kernels on plain tensors, each beside `naive.py`, the few lines of torch that say what it must compute."""
