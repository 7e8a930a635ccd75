"""Reads YAML recipes into typed stages."""
