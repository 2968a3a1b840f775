"""Activations become second moments: running sums in float64, and what their rounding may have cost."""
