"""Running a model over data, and the second moments and null spaces that come of it."""
