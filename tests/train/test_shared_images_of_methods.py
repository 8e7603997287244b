"""Every method trains on packed rows: a later task's loss and gradients are those of separate samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clmoe.bases.inputs import train_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.config import load_config
from clmoe.data.batches import NumberedDataset, collate_numbered, collate_packed, image_groups
from clmoe.data.records import Part, TrainRecord, Turn, UnionRecords, load_train
from clmoe.experts.model import load_adapter
from clmoe.methods import method_class, methods
from clmoe.methods.base import Method, TaskContext
from clmoe.methods.replay import mixed
from clmoe.train.loop import BatchPlan
from clmoe.train.loss import TrainedModel, enable_checkpointing
from tests.runs import Runs
from tests.support import TASKS, tiny_config

FEW = ("options.per_task=5", "options.ratio=0.25")
OVERRIDES = {
    "llava_cmoe": ("adapter.train_projector=false", "options.probe_min_steps=2", "locator.options.steps=20"),
    "replay": FEW,
    "der": FEW,
}
ADDS_A_LOSS = ("ewc", "mas", "lwf", "der", "olora", "llava_cmoe")
CONTINUED = [name for name in methods() if method_class(name).chain == "sequence"]
NewBase = Callable[[], LoadedBase]


def second_task(method: str, runs: Runs, base: LoadedBase, work: Path) -> tuple[TaskContext, Method, list[TrainRecord]]:
    """A method in its second task, some steps on; records of the task, four to an image, then those of its memory."""
    settings = OVERRIDES.get(method, ())
    previous = runs.chain(method, *settings, tasks=TASKS[:1])[0]
    root = runs.benchmark.parent
    images = root / TASKS[1] / "images"
    rows = load_train(root / TASKS[1] / "train.json", images)[:12]
    records = [TrainRecord(row.id, row.image and f"{k % 3}.png", row.turns) for k, row in enumerate(rows)]
    config = load_config(method, {}, list(settings), str(runs.model))
    model = load_adapter(base.model, previous, trainable=True)
    context = TaskContext(TASKS[1], 1, records, images, config, base, model, work, work, work, previous, root)
    kind = method_class(method)(config)
    phase = kind.phases(context)[0]
    phase.begin(context)
    context.image_root = phase.image_root
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return context, kind, list(max(records, phase.records, key=len))  # a probe trains on a few of the records


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", CONTINUED)
def test_loss_and_gradients_of_a_later_task(
    method: str, checkpointing: bool, runs: Runs, new_base: NewBase, tmp_path: Path
) -> None:
    base = new_base()
    context, kind, records = second_task(method, runs, base, tmp_path)
    assert (len(records) > 12) == (method in ("replay", "der"))
    dataset = NumberedDataset(train_dataset(base, records, context.image_root, 2048))
    rows, pad = [*range(min(8, len(records))), *range(12, len(records))], base.tokenizer.pad_token_id
    model = TrainedModel(context.model, kind, len(rows)).train()
    if checkpointing:
        enable_checkpointing(context.model)
    packed = collate_numbered(dataset.__getitems__(rows), pad, collate_packed)
    assert len(packed["packed_ids"]) < len(rows)
    assert packed["rows"].tolist() == rows
    alone = [collate_numbered([dataset[row]], pad) for row in rows]
    count = (packed["labels"] != -100).sum()

    def run(trained: TrainedModel, batches: list[dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
        trained.zero_grad()
        total = 0.0
        for batch in batches:
            loss = trained(**batch, num_items_in_batch=count)["loss"]
            loss.backward()
            total += float(loss.detach())
        return total, {name: p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None}

    loss, gradients = run(model, [packed])
    expected, oracle = run(model, alone)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == oracle.keys()
    assert len(gradients) > 4
    for name, gradient in gradients.items():
        assert (gradient - oracle[name]).norm() <= 1e-5 * oracle[name].norm() + 1e-8, name
    nothing = Method(tiny_config("lora", Path("nowhere")))
    plain, _ = run(TrainedModel(context.model, nothing, len(rows)).train(), [packed])
    assert (abs(loss - plain) > 1e-5 * plain) == (method in ADDS_A_LOSS), "its own loss is there, in methods with one"


def test_a_record_that_is_replayed_is_not_beside_itself() -> None:
    """Groups of an image hold a repeated record once each: batches would be all of one record otherwise."""
    own = Part("own", "", [TrainRecord(str(k), f"{k // 3}.png", (Turn("q", str(k)),)) for k in range(30)])
    memory = [TrainRecord(f"old/{k}", f"old{k // 2}.png", (Turn("q", "a"),)) for k in range(4)]
    records = mixed(own, memory, 0.5)
    assert len(records) == 60
    groups = image_groups(records)
    assert sorted(row for group in groups for row in group) == list(range(60))
    for group in groups:
        assert len({records[row].image for row in group}) == 1
        assert len({records[row].id for row in group}) == len(group)
    assert sorted(map(len, groups)) == [2] * 15 + [3] * 10
    union = UnionRecords([Part("t", "", own.records, passes=3)])
    assert sorted(map(len, image_groups(union))) == [3] * 30
    orders = [
        [row for step in range(15) for row in BatchPlan(0, 60, 8, micro, processes, groups).batch(step)]
        for processes, micro in ((1, None), (2, 2), (4, 1))
    ]
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("method", [name for name in methods() if method_class(name).chain != "none"])
def test_no_method_trains_with_dropout_on_shared_tokens(
    method: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "all" if method_class(method).chain == "union" else TASKS[0]
    with pytest.raises(SystemExit) as stop:
        runs.train(tmp_path / "x", method, task, "training.share_images=true", "adapter.dropout=0.1")
    assert stop.value.code == 2
    assert "training.share_images with adapter.dropout 0.1" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
