"""``clmoe check-method`` finds every broken promise, and methods and locators may come from outside the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from clmoe.config import LocatorConfig, load_config
from clmoe.contract import PROMISES, BrokenPromise, Trial
from clmoe.errors import ClmoeError
from clmoe.evaluate.run import summary_path
from clmoe.locators import make_locator
from clmoe.locators.base import Asked
from clmoe.methods import method_class

HEAD = '''
import torch
from clmoe.methods.lora import Lora
from clmoe.utils.tensors import trainable


class Mine(Lora):
    """{}"""

{}

METHODS = {{"mine": Mine}}
'''
BROKEN = {
    "docstring": ("", "    needs_gradients = False"),
    "no logit": (
        "B is not zero at first.",
        """
    def adapter(self, base):
        config = super().adapter(base)
        config.init_lora_weights = False
        return config
""",
    ),
    "the base as it was": (
        "It trains on what is frozen.",
        """
    def finish(self, model):
        with torch.no_grad():
            model.base_model.model.lm_head.weight += 1
""",
    ),
    "absolute path": (
        "It writes down where it is.",
        """
    def end_task(self, context):
        (context.work / "where.txt").write_text(str(context.work))
""",
    ),
    "first one's weights": (
        "It forgets at once.",
        """
    def check_inputs(self, previous, data):
        self.chain = "fresh"
""",
    ),
    "same bytes": (
        "It counts, and a kill loses the count.",
        """
    needs_gradients, count = True, 0

    def change_gradients(self, model, gradients, step):
        self.count += 1
        for gradient in gradients.values():
            gradient.div_(self.count)
""",
    ),
}
LOCATOR = '''
import torch
from clmoe.locators.base import Locator


class Second(Locator):
    """The second task, whatever is asked."""

    looks = False

    def scores(self, asked):
        return torch.eye(asked.tasks, dtype=torch.float64)[[1] * len(asked.ids)]


LOCATORS = {"second": Second}
'''


@pytest.mark.slow
@pytest.mark.parametrize("promise", BROKEN)
def test_a_broken_promise_is_found(promise: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(HEAD.format(*BROKEN[promise]))
    (check,) = [check for line, (check, _) in PROMISES.items() if promise in line]
    with pytest.raises(BrokenPromise):
        check(Trial(str(path), (), tmp_path))


def installed(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Lay out a package with a method and a locator in ``folder`` as pip would install it."""
    (folder / "of_others.py").write_text(HEAD.format("Another.", "    pass") + LOCATOR)
    info = folder / "of_others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: of-others\nVersion: 1.0\n")
    points = "[clmoe.methods]\nmine = of_others:Mine\n[clmoe.locators]\nsecond = of_others:Second\n"
    (info / "entry_points.txt").write_text(points)
    patch.syspath_prepend(str(folder))


def test_an_installed_package_adds_a_method_and_a_locator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClmoeError, match="'mine'"):
        method_class("mine")
    installed(tmp_path, monkeypatch)
    config = load_config("mine", {"adapter": {"rank": 3}}, [])
    assert (config.method, config.adapter.rank) == ("mine", 3), "it needs no YAML"
    assert method_class("mine").__module__ == "of_others"
    locator = make_locator(LocatorConfig("second"), 0)
    assert locator.scores(Asked(["a", "b"], 3)).argmax(1).tolist() == [1, 1]
    with pytest.raises(ClmoeError, match="second"):
        make_locator(LocatorConfig("secnd"), 0)
    sys.modules.pop("of_others")


def test_a_locator_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "second.py"
    path.write_text(LOCATOR)
    locator = make_locator(LocatorConfig(str(path)), 0)
    assert torch.equal(locator.scores(Asked(["a"], 2)), torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    cell = summary_path(tmp_path, "sqa", "text", str(path))
    assert cell == tmp_path / "predictions" / "sqa" / "text.second.json", "its answers lie beside the others"
    path.write_text(LOCATOR.replace("LOCATORS", "FOUND"))
    moved = path.rename(tmp_path / "third.py")
    with pytest.raises(ClmoeError, match=r"third\.py: expected LOCATORS"):
        make_locator(LocatorConfig(str(moved)), 0)
