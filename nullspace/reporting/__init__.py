"""Pages and figures from what was computed."""
