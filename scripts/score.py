"""Score a file of answers that was written elsewhere, by id or as the benchmark's published script does it.

    python scripts/score.py BENCHMARK TASK ANSWERS.jsonl [--data FOLDER] [--scoring fixed|official]

A line of the file is an object with `question_id` and `text`, as the scripts of LLaVA and its descendants write them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from clmoe.benchmarks.base import load_benchmark, task_questions
from clmoe.errors import ClmoeError
from clmoe.evaluate.rules.base import MODES
from clmoe.evaluate.rules.scoring import FileScore, score_file
from clmoe.report.answers import read_lines


def read_answers(path: Path) -> list[tuple[str | int, str]]:
    answers = []
    for number, line in read_lines(path):
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
