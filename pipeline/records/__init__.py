"""The record of a stage and of a chain: everything that is known about them, in their folders."""
