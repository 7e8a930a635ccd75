"""Costs, curves, gains, audit, report."""
