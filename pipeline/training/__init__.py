"""Training a stage: initial weights, parameter groups, objectives and the trainer."""
