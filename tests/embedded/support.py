"""What the tests of the embedded benchmark share."""

from pathlib import Path

import numpy as np

from clmoe.embedded.scenes import BACKGROUNDS, Scene, render
from tests.support import load_script

BASE = Path(__file__).resolve().parents[2] / "playground" / "base"

pretrain = load_script("playground/pretrain")
every_answer_word = pretrain.every_answer_word


def ink_mask(scene: Scene) -> np.ndarray:
    """Pixels [56, 56] that differ clearly from the background."""
    pixels = np.asarray(render(scene)).astype(int)
    return np.abs(pixels - np.array(BACKGROUNDS[scene.background].rgb)).sum(-1) > 90
