"""Adapters of experts that are stored as one tensor."""
