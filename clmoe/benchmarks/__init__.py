"""Benchmarks: which tasks exist, in which order, and where their files are."""
