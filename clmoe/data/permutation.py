"""The one source of random sample order."""

import numpy as np


def epoch_permutation(seed: int, epoch: int, records: int) -> np.ndarray:
    """The order of one epoch, a pure function of its arguments: ``[records]`` int64."""
    return np.random.default_rng([seed, epoch]).permutation(records)
