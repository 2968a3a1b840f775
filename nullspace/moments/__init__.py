"""Second moments of activations: running sums in float64, and estimates of their rounding errors."""
