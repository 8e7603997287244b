"""Paths, names, progress and logs."""
