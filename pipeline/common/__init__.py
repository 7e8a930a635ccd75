"""Shared by every room: errors, atomic file writes, processes, tables and timing."""
