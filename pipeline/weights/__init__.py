"""Reads and writes checkpoints, training states and exported weights."""
