"""The embedded benchmark: scenes drawn by code, two task sequences, and the base pre-trained for them."""

from clmoe.benchmarks.playground.build import SPECS, prepare

__all__ = ["SPECS", "prepare"]
