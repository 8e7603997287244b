"""The frozen base, asked the tasks' questions without any training."""

from clmoe.methods.base import Method


class ZeroShot(Method):
    """Trains nothing."""

    chain = "none"


METHOD = ZeroShot
