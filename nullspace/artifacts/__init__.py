"""Results in files, and the fingerprints that identify models, data and runs."""
