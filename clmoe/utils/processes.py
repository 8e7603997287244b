"""The data-parallel processes of one command, as a launcher starts them: what they agree on and how they share work.

All run the same code; only the main one writes files that stay. SIGTERM, which schedulers send, is handled here too.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from clmoe.errors import Interrupted

T = TypeVar("T")
R = TypeVar("R")

# The main process may score, write or fit something alone for a while before the others hear of it.
TIMEOUT = timedelta(hours=2)


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def device() -> str:
    """Where this process computes: its own GPU, or the CPU."""
    return f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"


def start() -> None:
    """Join the other processes; does nothing if there are none, or if it has joined already."""
    if count() == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)


def stop() -> None:
    """Leave the other processes at the end of a command; DeepSpeed makes a group even of one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def lost_another(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone; gloo's errors have no type of their own."""
    return count() > 1 and (isinstance(error, dist.DistError) or "/gloo/transport/" in str(error))


def leave(code: int) -> NoReturn:
    """End this process; with several, without Python's teardown, in which torch's communication thread may abort."""
    if count() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def from_main(decide: Callable[[], T]) -> T:
    """Return in all processes what ``decide`` returns in the main one; its error is raised in all of them, too."""
    if count() == 1:
        return decide()
    outcome: tuple[Any, Exception | None] = (None, None)
    if is_main():
        try:
            outcome = (decide(), None)
        except Exception as error:
            outcome = (None, error)
    value, failure = _gather(outcome)[0]
    if failure is not None:
        raise failure
    return value


def wait_for_all() -> None:
    """Continue once every process has come here."""
    if count() > 1:
        _gather(None)


def any_of_them(mine: bool) -> bool:
    return mine if count() == 1 else any(_gather(mine))


def in_order(items: Sequence[T], compute: Callable[[T], R]) -> list[R]:
    """``[compute(item) for item in items]`` in every process, each computing every n-th item; tensors on the CPU."""
    mine = [compute(item) for item in items[rank() :: count()]]
    shares = _gather(mine) if count() > 1 else [mine]
    return [shares[k % count()][k // count()] for k in range(len(items))]


def summed(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, which have one shape; the same bits in all of them; changes ``tensor``."""
    if count() > 1:
        start()
        dist.all_reduce(tensor)
    return tensor


def mean_of_each(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's mean of gradients over the processes, each gradient summed by itself (a hook of ``register_comm_hook``).

    The order in which more than two processes' numbers are added depends on their place in the message, and DDP packs
    its messages anew after a process's first step: a continued training would end with different bits.
    """
    whole = bucket.buffer().div_(count())
    sums = [dist.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()]
    # DDP's stream waits for a GPU's future, but not for one of ``collect_all``, which belongs to no device. NCCL sums
    # one gradient after the other, so its last future is enough; gloo's may end in any order.
    done = sums[-1] if whole.is_cuda else torch.futures.collect_all(sums)
    return done.then(lambda _: whole)


def _gather(value: Any) -> list[Any]:
    """Every process's value, by rank."""
    start()
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


EXIT_CODE = 75  # of a command that was stopped and continues when it is run again (sysexits.h: EX_TEMPFAIL)


@dataclass
class Asked:
    """Whether SIGTERM has come, and whether a block defers it."""

    now: bool = False
    deferred: bool = False


_asked = Asked()


def _handle(number: int, frame: FrameType | None) -> None:
    _asked.now = True
    if not _asked.deferred:
        raise Interrupted("stopped by SIGTERM")


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises ``Interrupted``, or waits for the end of a ``deferred`` block."""
    before: Any = signal.signal(signal.SIGTERM, _handle)
    _asked.now = False
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def deferred() -> Iterator[Asked]:
    """Within the block SIGTERM only sets ``now``, for the block to check; at its end ``Interrupted`` is raised."""
    _asked.deferred = True
    try:
        yield _asked
    finally:
        _asked.deferred = False
    if _asked.now:
        raise Interrupted("stopped by SIGTERM")
