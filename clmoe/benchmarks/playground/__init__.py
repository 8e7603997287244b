"""The embedded benchmark: scenes drawn by code, two task sequences, and the base pre-trained for them."""

from clmoe.benchmarks.playground.build import DEFAULT_ROOT, SPECS, prepare

__all__ = ["DEFAULT_ROOT", "SPECS", "prepare"]
