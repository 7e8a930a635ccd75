"""Transfer, parameter groups, objectives, the trainer."""
