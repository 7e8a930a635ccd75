"""Checkpoint files, training states, exported weights."""
