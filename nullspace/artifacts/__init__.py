"""What is kept in files, and the fingerprints by which models, data and runs are recognised."""
