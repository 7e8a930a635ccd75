"""Coded images: range coder, guards, the ways to code a step, the file format."""
