"""Reports come while the work goes on, the result last, and an error is not lost."""

import threading
from collections.abc import Callable

import pytest

from clmoe.demo.stream import stream


def test_reports_come_while_the_work_goes_on() -> None:
    seen_first = threading.Event()

    def work(report: Callable[[int], None]) -> int:
        report(1)
        assert seen_first.wait(20), "the first report was held back until the end"
        report(2)
        return 3

    items = stream(work)
    assert next(items) == 1
    seen_first.set()
    assert list(items) == [2, 3]


def test_an_error_is_raised_where_the_reports_are_read() -> None:
    def work(report: Callable[[int], None]) -> int:
        report(1)
        raise ValueError("no more")

    items = stream(work)
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)
