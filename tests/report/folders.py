"""Invented run folders for the tests of reports."""

import json
from pathlib import Path
from typing import Any

from clmoe.report.tables import Table

TASKS = ["colour_letter", "count", "box"]


def make_run(root: Path, label: str, seed: int, last: float = 50.0, immediate: bool = False, **info: Any) -> Path:
    """Write a run whose three tasks score 80 right after training and `last` at the end (box: 80)."""
    folder = root / f"{label}-{seed}".replace("/", "_")
    folder.mkdir(parents=True)
    order = info.get("order", TASKS)
    x, y, z = order
    header = f"after,{x},{y},{z}"
    write(folder / "matrix.csv", header, f"{x},80,,", f"{y},70,80,", f"{z},{last},{last},80")
    if immediate:
        write(folder / "immediate.csv", header, "known,81,82,83")
    record = {"method": "moelora", "benchmark": "playground-coin", "order": order, "seed": seed, "label": label}
    record |= {"trainable_parameters": 90_624, "adapter_parameters": 120_000, "projector_trained": False}
    record |= {"effective_scale": 2.0, "steps_per_task": 300}
    (folder / "run.json").write_text(json.dumps(record | info))
    return folder


def row_of(table: Table, *keys: str) -> dict[str, str]:
    """The cells of the one row with these keys, by column."""
    (row,) = [row for row in table.cells.to_dict("records") if tuple(row.values())[: len(keys)] == keys]
    return row


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path.parent


def write_expansion(run: Path, blocks: list[dict[str, Any]]) -> Path:
    """Write expansion.json with these blocks for the first tasks."""
    plans = [{"task": task, "blocks": plan} for task, plan in zip(TASKS, blocks, strict=False)]
    return write(run / "expansion.json", json.dumps(plans))


def block(activations: list[float], threshold: float, added: int, probes: int = 1) -> dict[str, Any]:
    """One block of an entry in expansion.json."""
    return {"activations": activations, "probes": probes, "threshold": threshold, "added": added}


def layer(number: int) -> str:
    return f"model.language_model.layers.{number}.mlp"


def predict(run: Path, after: str, stem: str, answers: dict[str, tuple[str, float]], **fields: Any) -> None:
    """Write a filled cell from question id -> (answer, score). Further fields replace those of every line."""
    path = run / "predictions" / after / f"{stem}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, (text, score) in answers.items():
        line = {"question_id": name, "image": f"{name}.png", "prompt": f"ask {name}", "answer": "gold", "task": None}
        lines.append(json.dumps(line | {"text": text, "score": score, "redone": False} | fields) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    path.with_suffix(".json").write_text("{}")
