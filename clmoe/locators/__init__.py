"""Locators find the task of a test sample. All but ``letter`` and ``learned`` work with every method that keeps
parts per task."""

from clmoe.config import LocatorConfig
from clmoe.errors import ClmoeError
from clmoe.locators.base import Locator
from clmoe.locators.centroid import ImageTextCentroid, TextCentroid
from clmoe.locators.gaussian import Gaussian
from clmoe.locators.knn import Knn
from clmoe.locators.known import Last, Oracle, Random
from clmoe.locators.learned import LearnedPrototype
from clmoe.locators.letter import GeneratedLetter
from clmoe.locators.prototype import NearestMean, Prototype
from clmoe.locators.vae import Vae
from clmoe.utils.names import unknown
from clmoe.utils.plugins import installed, named

LOCATORS: dict[str, type[Locator]] = {
    "oracle": Oracle,
    "last": Last,
    "random": Random,
    "nearest_mean": NearestMean,
    "prototype": Prototype,
    "gaussian": Gaussian,
    "knn": Knn,
    "text_centroid": TextCentroid,
    "image_text_centroid": ImageTextCentroid,
    "vae": Vae,
    "learned_prototype": LearnedPrototype,
    "generated_letter": GeneratedLetter,
}


def make_locator(config: LocatorConfig, seed: int) -> Locator:
    """The locator that a configuration gives by name, Python file or entry point ``clmoe.locators``; without any task.

    Raises ClmoeError if there is no such locator, or none is given.
    """
    if not config.name:
        known = ", ".join(sorted(LOCATORS | installed("LOCATORS")))
        raise ClmoeError(
            f"locator.name: this method keeps parts per task and needs a locator: set locator=NAME ({known})"
        )
    kind = named(config.name, "LOCATORS", LOCATORS)
    if kind is None:
        raise ClmoeError(f"locator.name: {unknown('locator', config.name, LOCATORS | installed('LOCATORS'))}")
    return kind(config, seed)
