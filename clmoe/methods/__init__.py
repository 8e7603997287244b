"""Continual-learning methods, one file each, behind the hooks of ``base.py``."""

SUPPORT_MODULES = (
    "base", "context", "adapters", "attached", "momentum", "statistics", "features", "expansion", "plan",
    "answers", "budget", "importance", "memory",
)  # fmt: skip
