"""Records of one image packed into one row: loss and gradients of separate samples; order complete; runs resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from clmoe.bases.llava import LoadedBase
from clmoe.data.batches import TrainDataset, collate_packed, collate_train, image_groups
from clmoe.data.records import TrainRecord, Turn
from clmoe.experts.forward import block_mask
from clmoe.experts.model import attach_adapter
from clmoe.methods import method_class
from clmoe.train.loop import BatchPlan, MicroBatches
from clmoe.train.loss import TrainedModel, enable_checkpointing
from tests.launch import launch, needs_deepspeed
from tests.runs import Runs, contents, events, same_bits, tensors
from tests.support import TASKS, tiny_config

METHODS = ("lora", "moelora", "clmoe", "llava_cmoe")
SETTINGS = {
    "llava_cmoe": (
        "options.initial_experts_from=first_task",
        "adapter.train_projector=false",
        "options.balance_weight=1",
    )
}


def records() -> list[TrainRecord]:
    """Images of three records, one and two, scattered; two records without image; one of two turns; two all alike."""
    return [
        TrainRecord("a1", "0.png", (Turn("What is it?", "red"),)),
        TrainRecord("b1", "1.png", (Turn("How many things are there?", "it is a thing on the left side"),)),
        TrainRecord("t1", None, (Turn("What is it?", "blue"),)),
        TrainRecord("a2", "0.png", (Turn("What is on it?", "left"), Turn("Are you sure?", "yes"))),
        TrainRecord("c1", "2.png", (Turn("Which colour is it?", "green"),)),
        TrainRecord("c2", "2.png", (Turn("Which colour is it?", "green"),)),
        TrainRecord("t2", None, (Turn("What is that?", "one"),)),
        TrainRecord("a3", "0.png", (Turn("What is it?", "red thing"),)),
    ]


@pytest.fixture
def dataset(tiny_base: LoadedBase, mini_yaml: Path) -> TrainDataset:
    images = mini_yaml.parent / "colour" / "images"
    return TrainDataset(
        records(), images, tiny_base.tokenizer, tiny_base.image_processor, tiny_base.image_token_count, 256
    )


def model_of(method: str, base: LoadedBase, *overrides: str) -> TrainedModel:
    """In float64, so that what is left of a difference is not rounding."""
    settings = ("adapter.train_projector=true", *SETTINGS.get(method, ()), *overrides)
    kind = method_class(method)(tiny_config(method, Path("nowhere"), *settings))
    model = attach_adapter(base.model.double(), kind.adapter(base)).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith((".B", "lora_B.default.weight")):
            parameter.data.normal_(std=0.1, generator=generator)
    return TrainedModel(model, kind, 8)


def double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def loss_and_gradients(model: TrainedModel, batches: list[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    answers = sum((batch["labels"] != -100).sum() for batch in batches)
    model.zero_grad()
    losses = [model(**double(batch), num_items_in_batch=answers)["loss"] for batch in batches]
    total = torch.stack(losses).sum()
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def exact_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss and the routers compute in float32 by design; here in float64. LLaMA's norms still round to float32."""
    monkeypatch.setattr(Tensor, "float", lambda self: self)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_are_those_of_separate_samples(
    method: str, attention: str, tiny_base: LoadedBase, dataset: TrainDataset, exact_head: None
) -> None:
    model, pad = model_of(method, tiny_base), tiny_base.tokenizer.pad_token_id
    tiny_base.model.set_attn_implementation(attention)
    packed = collate_packed(dataset.__getitems__(range(8)), pad)
    assert len(packed["packed_ids"]) == 5
    assert len(packed["pixel_values"]) == 3
    alone = [collate_train([dataset[row]], pad) for row in range(8)]
    loss, gradients = loss_and_gradients(model, [packed])
    expected, oracle = loss_and_gradients(model, alone)
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=0)
    assert gradients.keys() == oracle.keys()
    assert len(gradients) > 8
    for name, gradient in gradients.items():
        assert (gradient - oracle[name]).norm() <= 1e-6 * oracle[name].norm(), name


@pytest.mark.parametrize("method", ["moelora", "llava_cmoe"])
def test_cut_into_micro_batches_it_is_the_same(method: str, tiny_base: LoadedBase, dataset: TrainDataset) -> None:
    """Whatever meets in a micro-batch, with recomputation, and in float32 as in earnest."""
    model, pad = model_of(method, tiny_base).float(), tiny_base.tokenizer.pad_token_id
    enable_checkpointing(model.model)
    model.train()

    def run(cuts: list[list[int]], collate: Callable[[Any, int], dict[str, Tensor]]) -> tuple[Tensor, list[Tensor]]:
        batches = [collate(dataset.__getitems__(rows), pad) for rows in cuts]
        answers = sum((batch["labels"] != -100).sum() for batch in batches)
        model.zero_grad()
        total = torch.stack([model(**batch, num_items_in_batch=answers)["loss"] for batch in batches]).sum()
        total.backward()
        return total.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, oracle = run([list(range(8))], collate_train)
    for cuts in ([[0, 3, 7, 1], [4, 5, 2, 6]], [[0, 3], [7, 4], [5, 1], [2, 6]]):
        loss, gradients = run(cuts, collate_packed)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        for mine, theirs in zip(gradients, oracle, strict=True):
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_token_sees_the_prefix_and_its_own_rest() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3], [0, 0, 1, 2, 2, -1, -1, -1]])
    seen = block_mask(segments)
    assert seen.shape == (2, 1, 8, 8)
    for row in range(2):
        for query in range(8):
            for key in range(8):
                a, b = int(segments[row, query]), int(segments[row, key])
                visible = key == query or (key < query and a != -1 and b in (0, a))
                if a == -1 and key != query:
                    continue  # what padding sees is nobody's business
                assert bool(seen[row, 0, query, key]) == visible, (row, query, key)
    assert not seen[1, 0, :5, 5:].any(), "nobody sees padding"


def test_a_batch_holds_every_record_as_it_would_be_alone(tiny_base: LoadedBase, dataset: TrainDataset) -> None:
    pad = tiny_base.tokenizer.pad_token_id
    items = dataset.__getitems__(range(8))
    batch, plain = collate_packed(items, pad), collate_train([dataset[row] for row in range(8)], pad)
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[key], plain[key])
    for row, item in enumerate(items):
        places = batch["places"][row, : len(item.input_ids)]
        assert torch.equal(batch["packed_ids"].flatten()[places], item.input_ids)
        assert batch["packed_positions"].flatten()[places].tolist() == list(range(len(item.input_ids)))
        assert len({int(place) // batch["packed_ids"].shape[1] for place in places}) == 1
    tokens = int((batch["packed_segments"] >= 0).sum())
    assert tokens < 0.75 * int(plain["attention_mask"].sum())


@pytest.mark.parametrize(("processes", "micro"), [(1, None), (1, 2), (2, 4), (4, 1)])
def test_the_order_is_complete_and_keeps_images_together(processes: int, micro: int | None) -> None:
    images = [f"{k % 9}.png" if k % 5 else None for k in range(40)]
    groups = image_groups([TrainRecord(str(k), image, (Turn("q", "a"),)) for k, image in enumerate(images)])
    assert sorted(k for group in groups for k in group) == list(range(40))
    plan = BatchPlan(3, 40, 8, micro, processes, groups)
    stream = [index for step in range(15) for index in plan.batch(step)]
    for epoch in range(3):
        order = stream[40 * epoch : 40 * epoch + 40]
        assert sorted(order) == list(range(40))
        starts = [order.index(group[0]) for group in groups]
        assert all(tuple(order[s : s + len(g)]) == g for s, g in zip(starts, groups, strict=True))
    assert stream[:40] != stream[40:80]
    assert plan.batch(11) == BatchPlan(3, 40, 8, None, 1, groups).batch(11), "a step needs none of those before it"
    loaders = [list(MicroBatches(plan, 5, rank=rank)) for rank in range(processes)]
    for step in range(5):
        part = slice(step * plan.accumulation, (step + 1) * plan.accumulation)
        assert sorted(i for loader in loaders for b in loader[part] for i in b) == sorted(plan.batch(step))


SETTINGS_OF_RUNS = (
    "training.share_images=true",
    "training.save_steps=1",
    "training.learning_rate=1e-3",
    "training.projector_learning_rate=1e-4",
)


@pytest.fixture
def few_images(runs: Runs, tmp_path: Path) -> str:
    """YAML of the miniature benchmark with three images in the place of its second task's twenty-four."""
    folder = Path(shutil.copytree(runs.benchmark.parent, tmp_path / "few"))
    path = folder / TASKS[1] / "train.json"
    rows = json.loads(path.read_text())
    for number, row in enumerate(rows):
        if "image" in row:
            row["image"] = f"{number % 3}.png"
    path.write_text(json.dumps(rows))
    values = yaml.safe_load(runs.benchmark.read_text()) | {"root": str(folder)}
    (folder / "mini.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return str(folder / "mini.yaml")


def test_an_interrupted_training_ends_in_the_same_bytes(
    runs: Runs, few_images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clmoe.train.loop import Report

    def train(name: str, *settings: str) -> Path:
        return runs.train(tmp_path / name / TASKS[1], "moelora", TASKS[1], *settings, benchmark=few_images)

    straight = train("straight", *SETTINGS_OF_RUNS)
    real = Report.on_step_end

    def die(self: Report, args: Any, state: Any, control: Any, **named: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt
        real(self, args, state, control, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Report, "on_step_end", die)
        with pytest.raises(KeyboardInterrupt):
            train("broken", *SETTINGS_OF_RUNS)
    broken = train("broken", *SETTINGS_OF_RUNS)
    assert [event["step"] for event in events(broken.parent, "step")] == [1, 2, 3, 4]
    assert contents(broken) == contents(straight)
    loader = train("loader", *SETTINGS_OF_RUNS, "training.workers=1")
    assert all(same_bits(tensors(loader)[name], value) for name, value in tensors(straight).items())
    plain = train("plain", *SETTINGS_OF_RUNS[1:])
    assert any(not same_bits(tensors(plain)[name], value) for name, value in tensors(straight).items()), "another order"


def test_two_processes_train_as_one(runs: Runs, few_images: str, tmp_path: Path) -> None:
    alone = runs.train(tmp_path / "one" / TASKS[1], "moelora", TASKS[1], *SETTINGS_OF_RUNS, benchmark=few_images)
    fixed = ["--config", "moelora", "--task", TASKS[1], "--model", str(runs.model), "--benchmark", few_images]
    both = tmp_path / "two" / TASKS[1]
    launch(2, "-m", "clmoe.cli", "train", *fixed, "--output", str(both), *SETTINGS_OF_RUNS)
    losses = [torch.tensor([event["loss"] for event in events(run.parent, "step")]) for run in (alone, both)]
    assert len(losses[0]) == 4
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


@needs_deepspeed
def test_two_processes_with_zero2_train_as_one(runs: Runs, few_images: str, tmp_path: Path) -> None:
    """The same losses and weights, though processes and micro-batches cut the records of an image into other rows."""
    settings = [*SETTINGS_OF_RUNS, "training.micro_batch_size=2"]
    alone = runs.train(tmp_path / "one" / TASKS[1], "moelora", TASKS[1], *settings, benchmark=few_images)
    fixed = ["--config", "moelora", "--task", TASKS[1], "--model", str(runs.model), "--benchmark", few_images]
    both = tmp_path / "two" / TASKS[1]
    launch(2, "-m", "clmoe.cli", "train", *fixed, "--output", str(both), "--deepspeed", "zero2", *settings)
    (event,) = events(both.parent, "trained")
    assert (event["engine"], event["processes"]) == ("DeepSpeedEngine", 2)
    losses = [torch.tensor([event["loss"] for event in events(run.parent, "step")]) for run in (alone, both)]
    assert len(losses[0]) == 4
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for name, value in tensors(alone).items():
        # DeepSpeed clips gradients by a norm that it sums in another order
        torch.testing.assert_close(tensors(both)[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("override", "message"),
    [("adapter.dropout=0.1", "adapter.dropout 0.1"), ("model.attention=flash_attention_2", "flash_attention_2")],
)
def test_what_it_cannot_be_exact_with_is_refused(
    override: str, message: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        runs.train(tmp_path / "x", "moelora", TASKS[0], "training.share_images=true", override)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
