"""Paired differences against a textbook's figures."""

from pathlib import Path

import pytest

from clmoe.report.paired import Difference, difference, paired, verdict
from clmoe.report.run import group_runs
from tests.report.folders import make_run


def test_the_interval_is_students() -> None:
    # mean 2, s = 1, n = 3: half width 4.302653 / sqrt(3)
    found = paired([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert (found.low, found.high) == (pytest.approx(2 - 2.484138, abs=1e-5), pytest.approx(2 + 2.484138, abs=1e-5))
    assert paired([4.0]) == Difference(4.0, None, None, 1)


def test_seeds_are_paired_by_number_and_others_left_out(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "a", seed, last) for seed, last in ((0, 50.0), (1, 60.0), (5, 0.0))]
    runs += [make_run(tmp_path, "b", seed, last) for seed, last in ((1, 30.0), (0, 35.0), (7, 99.0))]
    a, b = group_runs(runs)
    found = difference(a, b, "last")
    # last = (2 x + 80) / 3: differences 10 and 20
    assert found is not None
    assert (found.mean, found.n) == (pytest.approx(15.0), 2)
    assert difference(a, b, "bwt_known") is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([5.0, 5.5, 6.0], "holds"),
        ([-5.0, -5.5, -6.0], "contradicted"),
        ([5.0, -5.5, 6.0], "no difference shown"),
        ([5.0, 5.5], "not verified (2 seeds)"),
        ([5.0], "not verified (1 seed)"),
        ([0.0, 0.0, 0.0], "no difference shown"),
    ],
)
def test_verdicts(values: list[float], said: str) -> None:
    assert verdict(paired(values)) == said
    assert verdict(None) == "not run"
