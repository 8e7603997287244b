"""What finding each question's task costs: features on shared prefixes and from the cache, against one prefill each.

    OMP_NUM_THREADS=1 python scripts/bench/locate.py [--images 16] [--tasks 4] [--batch 32] [--json]

A LLaVA-CMoE sequence is trained for a few steps per task on the embedded base, with five questions per image. After
every task, the questions of all tasks so far are answered, as in a sequence's evaluation: with the task known (oracle),
located with features kept on disk, and located the plain way, one prefill on the frozen base per question, nothing
kept. All run in one process; times are those of the GPU if there is one, else CPU seconds of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import yaml
from clock import Peak, device_name, timed
from five_questions import QUESTIONS, figures, open_base, questions, records, write_images

from clmoe import cli
from clmoe.data.records import Question
from clmoe.evaluate.answer import Answerer, open_answerer
from clmoe.experts.forward import FeatureStore
from clmoe.locators.base import Asked
from clmoe.train.checkpoint import read_checkpoint

STYLES = ("", "\nAnswer with one word.", "\nGive the answer as a letter.", "\nSay it in a whole sentence.")
NEW_TOKENS = 8
QUICK = (
    "training.steps=4",
    "training.batch_size=8",
    "adapter.train_projector=false",
    "options.initial_experts_from=first_task",
    "options.probe_min_steps=2",
    "locator.options.steps=100",
)


def write_benchmark(folder: Path, names: list[str], tasks: int) -> Path:
    """``tasks`` tasks on the same images, each with a style of asking; returns the YAML."""
    entries = []
    for style in STYLES[:tasks]:
        name = f"task{len(entries)}"
        rows = [
            {
                "id": record.id,
                "image": record.image,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{record.turns[0].question}{style}"},
                    {"from": "gpt", "value": record.turns[0].answer},
                ],
            }
            for record in records(names)
        ]
        test = [
            {"question_id": q.question_id, "image": q.image, "text": q.text + style, "answer": "red"}
            for q in questions(names)
        ]
        (folder / f"{name}.train.json").write_text(json.dumps(rows))
        (folder / f"{name}.test.json").write_text(json.dumps(test))
        entries.append(
            {
                "name": name,
                "train": f"{name}.train.json",
                "test": f"{name}.test.json",
                "images": "images",
                "scorer": "short_answer",
                "max_new_tokens": NEW_TOKENS,
            }
        )
    path = folder / "five.yaml"
    path.write_text(yaml.safe_dump({"name": "five", "root": str(folder), "recipe": {}, "tasks": entries}))
    return path


def train(folder: Path, benchmark: Path, tasks: int) -> list[Path]:
    """Checkpoints of the sequence."""
    done: list[Path] = []
    for number in range(tasks):
        arguments = ["train", "--config", "llava_cmoe", "--benchmark", str(benchmark), "--task", f"task{number}"]
        arguments += ["--output", str(folder / f"{number}"), *QUICK]
        arguments += ["--previous", str(done[-1])] if done else []
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            cli.main(arguments)
        done.append(folder / f"{number}")
    return done


def answerer_of(folder: Path, features: Path | None) -> Answerer:
    done = read_checkpoint(folder)
    return open_answerer(done.config, done, open_base("playground"), features)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """CPU seconds of a whole sequence's evaluation by each way of finding the task."""
    side = open_base("playground").model.config.vision_config.image_size
    names = write_images(folder / "images", args.images, side)
    checkpoints = train(folder, write_benchmark(folder, names, args.tasks), args.tasks)
    root, seconds, right, answered = folder / "images", dict.fromkeys(("oracle", "located", "plain"), 0.0), 0, 0
    peak = Peak()
    for learned, checkpoint in enumerate(checkpoints, 1):
        answerer = answerer_of(checkpoint, folder / "features")
        answerer.config = dataclasses.replace(answerer.config, batch_size=args.batch)
        plain = FeatureStore(answerer.base, "last", 1, None)
        for task in range(learned):
            asked = [
                Question(f"{task}-{q.question_id}", q.image, q.text + STYLES[task], "", {}) for q in questions(names)
            ]
            seconds["oracle"] += timed(lambda: answerer.answer(asked, root, NEW_TOKENS, "oracle", task))[0]  # noqa: B023
            spent, located = timed(lambda: answerer.answer(asked, root, NEW_TOKENS))  # noqa: B023
            seconds["located"] += spent

            def one_by_one() -> None:
                features = plain.features(answerer.model, asked, root)  # type: ignore[arg-type]  # noqa: B023
                answerer.own.scores(Asked([q.question_id for q in asked], learned, features))  # type: ignore[union-attr]  # noqa: B023

            seconds["plain"] += timed(one_by_one)[0]
            right += sum(a.task == task for a in located)
            answered += len(asked)
    return {
        "answers": answered,
        "located_right_percent": 100 * right / answered,
        "oracle_seconds": seconds["oracle"],
        "located_seconds": seconds["located"],
        "plain_location_seconds": seconds["plain"],
        "located_over_oracle": seconds["located"] / seconds["oracle"],
        "plain_located_over_oracle": 1 + seconds["plain"] / seconds["oracle"],
        "location_times_faster": seconds["plain"] / max(1e-9, seconds["located"] - seconds["oracle"]),
        "peak_mib": peak.mib(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help=f"each with {len(QUESTIONS)} questions")
    parser.add_argument("--tasks", type=int, default=4, choices=range(2, len(STYLES) + 1))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = figures(measure, args)
    if found is None:
        return
    print(device_name())
    for name, value in found.items():
        print(f"{name:28s} {value:10.4g}")


if __name__ == "__main__":
    main()
