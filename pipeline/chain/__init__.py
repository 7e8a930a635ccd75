"""Chains of stages: which stages must run, and running a stage up to its publication."""
