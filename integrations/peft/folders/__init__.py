"""What a folder holds: model cards, which base an adapter needs, and exporting a plain LoRA."""
