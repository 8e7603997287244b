"""What the page shows, read back from its HTML."""

import xml.etree.ElementTree as ET

import pytest

from clmoe.demo.panels import Asked, asked_panel, experts_panel, scores_panel
from clmoe.evaluate.answer import Explanation, RouterWeights

LEARNED = ["sqa", "te<xt", "box"]
SCORES = {
    "vae": {"sqa": -4.0, "te<xt": 1.0, "box": -1.5},
    "prototype": {"sqa": -10.0, "te<xt": -12.0, "box": -11.0},
}
GROWN = [
    RouterWeights(0, "", [-1, -1, 0, 1, 2], [0.5, 0.25, 0.0, 0.25]),
    RouterWeights(1, "", [-1, -1, 0, 2], [0.9, 0.06, 0.04]),
]


def table(html: str) -> list[list[str]]:
    """Cells of the panel's table; parsing fails where names are not escaped."""
    root = ET.fromstring(f"<div>{html}</div>")
    return [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]


def test_scores_of_every_task_by_every_decider() -> None:
    html = scores_panel(Explanation("2", "box", SCORES, []))
    assert table(html) == [
        ["task", "vae", "prototype"],
        ["sqa", "-4.00", "-10.00"],
        ["te<xt", "1.00", "-12.00"],
        ["box", "-1.50", "-11.00"],
    ]
    root = ET.fromstring(f"<div>{html}</div>")
    assert [row[0].text for row in root.iter("tr") if row.get("class") == "chosen"] == ["box"]
    assert [bold.text for bold in root.iter("b")] == ["vae", "te<xt", "box", "-10.00", "1.00"]
    widths = [div.get("style") for div in root.iter("div") if div.get("class") == "bar"]
    assert widths == [f"width:{w}%" for w in (0, 100, 100, 0, 50, 50)]


def test_experts_stand_under_the_task_that_brought_them() -> None:
    html = experts_panel(Explanation("2", "te<xt", {}, GROWN), LEARNED)
    assert table(html) == [
        ["experts", "before task 1", "sqa", "te<xt", "box"],
        ["", "1", "2", "1", "1", "1"],
        ["block 0", "50", "25", "0", "25", "·"],
        ["block 1", "90", "6", "4", "", "·"],
    ]
    shades = [cell.get("style") for cell in ET.fromstring(f"<div>{html}</div>").iter("td")]
    assert shades == [f"--share:{s}%" if s is not None else None for s in (56, 28, 0, 28, None, 100, 7, 4, None, None)]
    assert "out of its routers' reach" in html


def test_shared_experts_have_no_owner() -> None:
    routers = [RouterWeights(3, "up_proj", [0, 0], [0.4, 0.6])]
    html = experts_panel(Explanation("2", "sqa", {}, routers), LEARNED)
    assert table(html) == [["experts", "shared by all tasks"], ["", "1", "2"], ["block 3 up_proj", "40", "60"]]
    assert "reach" not in html


@pytest.mark.parametrize("panel", [scores_panel, lambda e: experts_panel(e, LEARNED)])
def test_methods_without_scores_or_experts_say_so(panel: object) -> None:
    assert "<table" not in panel(Explanation("2", None, {}, []))  # type: ignore[operator]


def test_answers_are_listed_newest_first() -> None:
    html = asked_panel([Asked("a < b?", "located", "sqa", "yes"), Asked("c?", "", None, "<no>")])
    assert table(html)[1:] == [["c?", "", "", "<no>"], ["a < b?", "located", "sqa", "yes"]]
