"""Expected answers that lie in other files than the questions: the readers by name.

A reader takes the gold files of a task and its questions, and returns the questions with what the task's scorer needs
in ``answer`` or ``extra``. A question without an entry in the files is an error that names file and id; given a
function for such errors, the reader tells them to it, goes on, and leaves the questions out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from clmoe.benchmarks import coin, ucit

if TYPE_CHECKING:
    from clmoe.data.records import Failed, Question


@dataclass(frozen=True)
class Gold:
    """A task's gold files, absolute, and the name of their reader."""

    reader: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Reader:
    """How gold files are read.

    Attributes:
        read: ``(files, questions, failed)``.
        files: what they are.
        whole: it compares the files with the test file as a whole, so that it needs all of its questions.
    """

    read: Callable[[Sequence[Path], Sequence[Question], Failed | None], list[Question]]
    files: tuple[str, ...]
    whole: bool = False


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "scienceqa": Reader(coin.scienceqa_answers, ("problems.json", "pid_splits.json"), whole=True),
        "textvqa": Reader(coin.textvqa_answers, ("TextVQA_0.5.1_val.json",)),
        "gqa": Reader(coin.gqa_answers, ("testdev_balanced_questions.json",)),
        "coco_captions": Reader(ucit.coco_captions, ("captions in COCO's format",), whole=True),
    }
)
