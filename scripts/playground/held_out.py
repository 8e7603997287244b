"""Hold out training records as test questions, so that strengths can be chosen without looking at the test set.

    python scripts/playground/held_out.py [playground-coin] [--last 200] [--output runs/held-out]
    clmoe run ewc runs/held-out/playground-coin-held-out.yaml options.samples=200 options.weight=1000

Images stay where they are. Records of the embedded benchmark have one turn each; boxes get the fields that their
scoring rule reads.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from clmoe.benchmarks.prepare import open_benchmark
from clmoe.utils.paths import find_config


def question(record: dict[str, Any], images: Path, scorer: str) -> dict[str, Any]:
    """Turn a training record into a test question."""
    asked, answered = (turn["value"] for turn in record["conversations"])
    row = {"question_id": record["id"], "text": asked.removeprefix("<image>\n"), "answer": answered}
    if "image" in record:
        row["image"] = record["image"]
    if scorer == "iou":
        with Image.open(images / record["image"]) as image:
            row |= {"answer_bbox": answered, "size": list(image.size)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", nargs="?", default="playground-coin")
    parser.add_argument("--last", type=int, default=200, help="records of each task that become questions")
    parser.add_argument("--output", type=Path, default=Path("runs/held-out"))
    args = parser.parse_args()
    benchmark = open_benchmark(args.benchmark)
    name = f"{benchmark.name}-held-out"
    config = yaml.safe_load(find_config("benchmarks", args.benchmark).read_text(encoding="utf-8"))
    for entry, task in zip(config["tasks"], benchmark.tasks, strict=True):
        records = json.loads(task.train.read_text(encoding="utf-8"))
        kept, asked = records[: -args.last], records[-args.last :]
        files = {"train": kept, "test": [question(record, task.image_root, task.scorer) for record in asked]}
        for part, rows in files.items():
            path = args.output.resolve() / name / task.name / f"{part}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows), encoding="utf-8")
            entry[part] = str(path)
    config |= {"name": name, "root": str(benchmark.root)}
    del config["prepare"]
    target = args.output / f"{name}.yaml"
    target.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
