"""The embedded benchmark: scenes drawn by code, and two sequences of tasks about them."""
