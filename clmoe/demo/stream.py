"""A function that reports on its way, turned into an iterator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def stream(work: Callable[[Callable[[T], None]], T]) -> Iterator[T]:
    """Everything that ``work(report)`` reports, as it comes, and then what it returns; its error is raised here."""
    queue: SimpleQueue[T | None] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, queue.put)
        future.add_done_callback(lambda done: queue.put(None))
        while (item := queue.get()) is not None:
            yield item
        yield future.result()
