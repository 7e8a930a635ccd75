"""YAML to typed stages."""
