"""Replay and DER: what is remembered, how it is mixed in, and the logits that DER stores."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from clmoe.bases.inputs import train_dataset
from clmoe.data.records import Part, TrainRecord, load_questions, load_train
from clmoe.experts.forward import adapted_base
from clmoe.experts.model import load_adapter
from clmoe.methods.base import TaskContext
from clmoe.methods.memory import MEMORY, Remembered, load_memory
from clmoe.methods.replay import LOGITS, mixed
from clmoe.train import task as task_module
from clmoe.utils.tensors import same_bits
from tests.methods.helpers import NewBase, begun, task_records
from tests.runs import Runs
from tests.support import TASKS, train_batches

FIRST, SECOND, THIRD = TASKS
METHODS = ("replay", "der")
FEW = ("options.per_task=5", "options.ratio=0.25")


def memory(checkpoint: Path) -> list[dict[str, Any]]:
    return json.loads((checkpoint / MEMORY).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_memory_holds_a_few_training_rows_of_each_past_task(method: str, runs: Runs) -> None:
    """The memory has as many rows as allowed and no test row; texts are the training file's, images stay in place."""
    root = runs.benchmark.parent
    first, second = runs.chain(method, *FEW)
    assert memory(second)[:1] == memory(first), "what is remembered of a task is never drawn again"
    for entry, task in zip(memory(second), TASKS[:2], strict=True):
        folder = root / task
        rows = {record.id: record for record in load_train(folder / "train.json", folder / "images")}
        test = {(q.image, q.text) for q in load_questions(folder / "test.json", folder / "images")}
        assert (entry["task"], entry["drawn_from"], entry["seed"]) == (task, len(rows), 0)
        assert len({record["id"] for record in entry["records"]}) == len(entry["records"]) == 5
        for record in entry["records"]:
            row = rows[record["id"].removeprefix(f"{task}/")]
            assert record["turns"] == [[turn.question, turn.answer] for turn in row.turns]
            assert record["image"] == (None if row.image is None else f"{task}/images/{row.image}")
            if row.image is not None:  # questions without an image are the same in both files
                assert (row.image, row.turns[0].question) not in test
                assert (root / record["image"]).is_file()


def test_every_record_is_drawn_equally_often() -> None:
    """Over 1,000 seeds, 3 of 12 records each, a record's picks are binomial with p = 1/4: within five deviations."""
    records = [TrainRecord(str(number), None, ()) for number in range(12)]
    picks = dict.fromkeys([f"t/{number}" for number in range(12)], 0)
    for seed in range(1000):
        context = SimpleNamespace(
            task="t", records=records, config=SimpleNamespace(seed=seed), image_root=Path(), data=Path()
        )
        for record in Remembered.of(cast(TaskContext, context), 3).records:
            picks[record.id] += 1
    assert sum(picks.values()) == 3000
    assert all(abs(count - 250) < 5 * (1000 * 0.25 * 0.75) ** 0.5 for count in picks.values())


def test_the_ratio_is_the_memorys_share() -> None:
    new, old = ([TrainRecord(f"{kind}{i}", None, ()) for i in range(n)] for kind, n in (("new", 24), ("old", 5)))
    for ratio, wanted in ((0.0, 0), (0.1, 3), (0.25, 8), (0.5, 24), (0.75, 72)):
        result = mixed(Part("", "", new), old, ratio)
        assert result[:24] == new
        assert len(result) == 24 + wanted
        counts = Counter(record.id for record in result[24:])
        assert {counts[record.id] for record in old} <= {wanted // 5, wanted // 5 + 1}
    assert mixed(Part("", "", new), [], 0.5)[:] == new


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.25, 0.5, 0.75])
def test_every_past_task_is_replayed_alike(ratio: float) -> None:
    """Memories of equal size, oldest first, of more records together than are needed, as many, or fewer."""
    new = [TrainRecord(f"new{i}", None, ()) for i in range(2000)]
    old = [TrainRecord(f"{task}", None, ()) for task in range(7) for _ in range(100)]
    counts = Counter(record.id for record in mixed(Part("", "", new), old, ratio)[2000:])
    assert counts.total() == round(2000 * ratio / (1 - ratio))
    assert len(counts) == 7 and max(counts.values()) - min(counts.values()) <= 1


def test_it_trains_on_the_task_and_the_memory(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = runs.chain("replay", *FEW)[1]
    seen: list[Any] = []
    real = task_module._phase_steps
    monkeypatch.setattr(task_module, "_phase_steps", lambda r, phase: seen.append(phase) or real(r, phase))
    runs.train(tmp_path / THIRD, "replay", THIRD, *FEW, "training.steps=1", previous=second)
    records, root = seen[0].records, seen[0].image_root
    assert len(records) == 24 + 8
    old = [record["id"] for entry in memory(second) for record in entry["records"]]
    assert [record.id for record in records[24:]] == [old[number] for number in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert {record.id.split("/")[0] for record in records[:24]} == {THIRD}
    assert all(record.image is None or (root / record.image).is_file() for record in records)
    assert len(memory(tmp_path / THIRD)) == 3


def test_a_lost_image_of_a_past_task_stops_before_anything_is_loaded(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = runs.chain("replay", *FEW, tasks=TASKS[:1])[0]
    shutil.copytree(runs.benchmark.parent, tmp_path / "data")
    values = yaml.safe_load(runs.benchmark.read_text()) | {"root": str(tmp_path / "data")}
    (tmp_path / "moved.yaml").write_text(yaml.safe_dump(values))
    record = next(record for record in memory(first)[0]["records"] if record["image"])
    (tmp_path / "data" / record["image"]).unlink()
    # the task's own training set is checked first, so the lost image must belong to another task
    monkeypatch.setattr(task_module, "load_base", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(SystemExit):
        runs.train(
            tmp_path / "run" / SECOND, "replay", SECOND, *FEW, previous=first, benchmark=str(tmp_path / "moved.yaml")
        )
    error = capsys.readouterr().err
    assert record["id"] in error and record["image"] in error and MEMORY in error


# ---- DER


def test_stored_logits_are_the_models_at_the_tasks_end(runs: Runs, new_base: NewBase) -> None:
    """Oracle: transformers' own logits after each task, one record at a time. Older ones are kept bit for bit."""
    checkpoints = runs.chain("der", *FEW)
    stored = [load_file(checkpoint / LOGITS) for checkpoint in checkpoints]
    assert [len(logits) for logits in stored] == [5, 10]
    for name, value in stored[0].items():
        assert same_bits(stored[1][name], value)
    for position, checkpoint in enumerate(checkpoints):
        base, records = new_base(), load_memory(checkpoint)[position].records
        model = adapted_base(load_adapter(base.model, checkpoint, trainable=False).eval())
        dataset = train_dataset(base, records, runs.benchmark.parent, 2048)
        for number, batch in enumerate(train_batches(base, dataset, 1)):
            labels = batch.pop("labels")[0]
            with torch.no_grad():
                logits = model(**batch).logits[0, :-1][labels[1:] != -100]
            found = stored[position][f"{5 * position + number:06}"]
            torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)


def test_only_replayed_records_are_held_to_their_logits(runs: Runs, new_base: NewBase) -> None:
    """Rows 0 and 23 are the new task's; the others, the first and the last among them, repeat records of the memory."""
    root, base = runs.benchmark.parent, new_base()
    first = runs.chain("der", *FEW, tasks=TASKS[:1])[0]
    own, images = task_records(runs.benchmark, SECOND)
    method, model = begun("der", base, runs, first, "options.weight=0.3", records=own)
    model.eval()
    old = load_memory(first)[0].records
    rows = [23, 24, 0, 35, 47]
    trained_on = mixed(Part.of(SECOND, own, images, root), old, 0.5)
    records = [trained_on[row] for row in rows]
    assert len({record.id for record in records}) == 5
    (batch,) = train_batches(base, train_dataset(base, records, root, 2048), 5)
    labels = batch["labels"]
    answered = labels[:, 1:] != -100
    with torch.no_grad():
        every = adapted_base(model)(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]

    def loss(logits: Tensor) -> Tensor | None:
        given = {**batch, "rows": torch.tensor(rows), "logits": logits}
        return method.extra_loss(model, None, given)  # type: ignore[arg-type]

    assert float(loss(every[answered])) < 1e-8, "the model is still the one that gave them"  # type: ignore[arg-type]
    moved = every + 0.1 * torch.randn(every.shape, generator=torch.Generator().manual_seed(0))
    stored, expected = load_file(first / LOGITS), 0.0
    for number, row in enumerate(rows):
        if row >= 24:
            then = stored[f"{old.index(records[number]):06}"].double()
            expected += float((moved[number][answered[number]].double() - then).square().mean())
    given = moved[answered].requires_grad_()
    found = loss(given)
    assert found is not None
    assert float(found.detach()) == pytest.approx(0.3 * expected / len(rows), rel=1e-4)
    found.backward()
    assert given.grad is not None
    of = answered.nonzero()[:, 0]
    assert not given.grad[(of == 0) | (of == 2)].any()
    assert given.grad[of == 1].any()
