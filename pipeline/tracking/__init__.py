"""Logging to MLflow, and reading what was logged."""
