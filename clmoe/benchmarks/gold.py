"""Expected answers that lie in other files than the questions: the readers by name.

A reader takes the gold files of a task and its questions, and returns the questions with what the task's scorer needs
in ``answer`` or ``extra``. A question without an entry in the files is an error that names file and id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from clmoe.benchmarks import coin, ucit

if TYPE_CHECKING:
    from clmoe.data.records import Question


@dataclass(frozen=True)
class Gold:
    """A task's gold files, absolute, and the name of their reader."""

    reader: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Reader:
    """``read(files, questions)``, and what the files are."""

    read: Callable[[Sequence[Path], Sequence[Question]], list[Question]]
    files: tuple[str, ...]


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "scienceqa": Reader(coin.scienceqa_answers, ("problems.json", "pid_splits.json")),
        "textvqa": Reader(coin.textvqa_answers, ("TextVQA_0.5.1_val.json",)),
        "gqa": Reader(coin.gqa_answers, ("testdev_balanced_questions.json",)),
        "coco_captions": Reader(ucit.coco_captions, ("captions in COCO's format",)),
    }
)
