"""Score a file of answers that was written elsewhere, by id or as the benchmark's published script does it.

    python scripts/score.py BENCHMARK TASK ANSWERS.jsonl [--data FOLDER] [--scoring fixed|official]

A line of the file is an object with `question_id` and `text`, as the scripts of LLaVA and its descendants write them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clmoe.benchmarks.base import load_benchmark, task_questions
from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.rules import MODES, Mode
from clmoe.evaluate.scoring import CAPTIONS, score_answers

# Published scripts find a line's question by its id and divide by the number of lines, except these.
PAIRED_BY_POSITION = ("class_name", CAPTIONS)
DIVIDED_BY_QUESTIONS = ("option_letter",)


class FileScore(NamedTuple):
    """The score in percent, and the number of samples that it claims to cover."""

    percent: float
    samples: int


def score_file(
    scorer: str, lines: Sequence[tuple[str | int, str]], questions: Sequence[Question], mode: Mode = "fixed"
) -> FileScore:
    """Score a file of answers (question id and text, in file order) that may lack lines or have another order.

    ``fixed`` finds each line's question by its id, compared as text; a question without a line is wrong. ``official``
    does what the scorer's published script does, but does not stop at ids that are numbers in one file and text in the
    other.

    Raises:
        ClmoeError: a line for an unknown question, two lines for one, or as ``score_answers``.
    """
    asked = {str(question.question_id): question for question in questions}
    answers: dict[str, str] = {}
    for number, (name, text) in enumerate(lines, 1):
        if str(name) in answers or str(name) not in asked:
            why = "has a second line; keep one" if str(name) in answers else "is not in the test file; take its answers"
            raise ClmoeError(f"line {number}: question_id {name!r} {why}")
        answers[str(name)] = text
    if mode == "fixed" or scorer in DIVIDED_BY_QUESTIONS:
        texts = [answers.get(name, "") for name in asked]  # under these rules "" is never right
        return FileScore(100 * score_answers(scorer, texts, questions, mode).score, len(questions))
    if not lines:
        raise ClmoeError("the file of answers is empty; published scripts divide by its length")
    in_order = scorer in PAIRED_BY_POSITION
    paired = list(questions[: len(lines)]) if in_order else [asked[name] for name in answers]
    result = score_answers(scorer, list(answers.values()), paired, mode)
    samples = 0 if scorer == "ocr_vqa" else len(lines)  # its script prints the length of a list that it never fills
    return FileScore(100 * result.score, samples)


def read_answers(path: Path) -> list[tuple[str | int, str]]:
    answers = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # not splitlines: answers may hold other breaks
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers.append((row["question_id"], str(row["text"])))
        except (ValueError, TypeError, KeyError) as error:
            raise ClmoeError(f"{path}: line {number}: expected question_id and text ({error!r})") from error
    return answers


def main(arguments: list[str] | None = None) -> FileScore:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("benchmark")
    parser.add_argument("task")
    parser.add_argument("answers", type=Path)
    parser.add_argument("--data", type=Path, help="the benchmark's data folder (default: the YAML's root)")
    parser.add_argument("--scoring", choices=MODES, default="fixed")
    options = parser.parse_args(arguments)
    task = load_benchmark(options.benchmark, options.data, check_files=False).task(options.task)
    score = score_file(task.scorer, read_answers(options.answers), task_questions(task), options.scoring)
    print(f"Samples: {score.samples}\nAccuracy: {score.percent:.2f}%")
    return score


if __name__ == "__main__":
    try:
        main()
    except (ClmoeError, OSError) as error:
        sys.exit(f"score: {error}")
