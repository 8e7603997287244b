"""LLaVA-CMoE end to end on the tiny LLaVA: what is older never moves, and the plan is what was done."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from clmoe.bases.inputs import prompt_dataset, train_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.config import Config
from clmoe.data.batches import first_questions, sample_records
from clmoe.data.records import load_train
from clmoe.errors import ClmoeError
from clmoe.experts.forward import adapted_base, last_prompt_features
from clmoe.experts.layer import expert_layers
from clmoe.experts.model import adapter_tensors, load_adapter
from clmoe.experts.routing import RouteSelection, routing
from clmoe.locators.vae import Options as VaeOptions
from clmoe.locators.vae import fit_vae
from clmoe.methods.base import Method, TaskContext
from clmoe.methods.llava_cmoe import BlockDecision, LlavaCMoe, choose_blocks, decide, measure_activations
from clmoe.train import task as task_module
from clmoe.train.checkpoint import read_checkpoint
from clmoe.train.loop import TaskTrainer
from clmoe.train.loss import TrainedModel
from tests.runs import Runs, contents, events, same_bits, tensors
from tests.support import TASKS as THREE
from tests.support import prompt_batch, prompt_batches, tiny_config, train_batches

FAST = (
    "adapter.train_projector=false",
    "options.probe_min_steps=4",
    "options.probe_share=0.5",
    "locator.options.steps=60",
    "locator.options.hidden=16",
    "locator.options.latent=4",
    "locator.options.held_out=0.5",
)
TASKS = (*THREE, "again")
STARTS = ("first_task", "warmup")
LINEARS = ("up_proj", "down_proj")
BLOCKS = [f"model.language_model.layers.{block}.mlp" for block in range(2)]


@pytest.fixture(scope="module")
def runs(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs on four tasks: the miniature benchmark's, and its first one's records once more under another name."""
    values = yaml.safe_load(runs.benchmark.read_text())
    values["name"] = "mini-of-four"
    values["tasks"].append({**values["tasks"][0], "name": TASKS[3]})
    benchmark = runs.benchmark.with_name("mini-of-four.yaml")
    benchmark.write_text(yaml.safe_dump(values, sort_keys=False))
    return Runs(tmp_path_factory.mktemp("runs-of-four"), runs.model, benchmark)


def settings(runs: Runs, start: str, *options: str) -> list[str]:
    """Overrides of a run; the warm-up learns the third task's records."""
    warm = runs.benchmark.parent / TASKS[2]
    paths = [f"options.warmup_train={warm}/train.json", f"options.warmup_images={warm}/images"]
    chosen = [f"options.{option}" for option in options]
    return [*FAST, f"options.initial_experts_from={start}", *(paths if start == "warmup" else []), *chosen]


def chain(runs: Runs, start: str, *options: str, tasks: tuple[str, ...] = TASKS) -> list[Path]:
    return runs.chain("llava_cmoe", *settings(runs, start, *options), tasks=tasks)


def packed(saved: dict[str, Tensor], block: str, linear: str) -> tuple[Tensor, Tensor]:
    """All experts of a linear, oldest first: ``A [E*r, din]``, ``B [dout, E*r]``."""
    stem = f"base_model.model.{block}.clmoe_experts.{linear}"
    A, B = ([saved[f"{stem}.{part}{f}"] for part in ("frozen_", "") if f"{stem}.{part}{f}" in saved] for f in "AB")
    return torch.cat(A), torch.cat(B, dim=1)


def routers(saved: dict[str, Tensor], block: str) -> list[Tensor]:
    stem = f"base_model.model.{block}.clmoe_routers.instance"
    count = sum(name.startswith(stem) for name in saved)
    return [saved[f"{stem}.{i}.weight"] for i in range(count)]


def adapter_config(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "adapter_config.json").read_text())


def plan(checkpoint: Path) -> list[dict[str, Any]]:
    return json.loads((checkpoint / "expansion.json").read_text())


def read_decision(row: dict[str, Any]) -> BlockDecision:
    return BlockDecision(row["activations"], row["probes"], row["threshold"], row["probed"], row["margin"])


@pytest.mark.parametrize("start", STARTS)
def test_what_is_older_is_bit_identical_after_every_task(start: str, runs: Runs) -> None:
    checkpoints = chain(runs, start)
    for parent, child in pairwise(checkpoints):
        old, new = tensors(parent), tensors(child)
        for block in BLOCKS:
            for linear in LINEARS:
                (A, B), (later_A, later_B) = packed(old, block, linear), packed(new, block, linear)
                assert same_bits(later_A[: len(A)], A)
                assert same_bits(later_B[:, : B.shape[1]].contiguous(), B)
            for mine, later in zip(routers(old, block), routers(new, block), strict=False):
                assert same_bits(later, mine)
        vaes, more = (load_file(folder / "locator.safetensors") for folder in (parent, child))
        assert vaes.keys() < more.keys()
        for name, value in vaes.items():
            assert same_bits(more[name], value), name
        assert plan(child)[:-1] == plan(parent)
        assert read_checkpoint(child).lineage.base == read_checkpoint(parent).lineage.base


@pytest.mark.parametrize("start", STARTS)
def test_the_plan_is_what_was_done_and_probes_are_gone(start: str, runs: Runs) -> None:
    """Also: a block that is not extended gets a router of the task all the same."""
    checkpoints = chain(runs, start)
    count = dict.fromkeys(BLOCKS, 4)
    seen = set()
    for index, checkpoint in enumerate(checkpoints):
        last = plan(checkpoint)[-1]
        assert last["task"] == TASKS[index]
        assert set(last["blocks"]) == (set() if start == "first_task" and index == 0 else set(BLOCKS))
        for block, row in last["blocks"].items():
            again = decide(torch.tensor(row["activations"], dtype=torch.float64), 1, 0.8)
            assert again == read_decision(row)
            assert len(row["activations"]) == count[block] + 1
            assert sum(row["activations"]) == pytest.approx(2), "two experts per token"
            assert row["added"] == row["probed"]
            count[block] += row["added"]
            seen.add(row["added"])
        config, saved = adapter_config(checkpoint), tensors(checkpoint)
        first = -1 if start == "warmup" else 0
        assert config["router_owners"] == list(range(first, index + 1))
        for number, block in enumerate(BLOCKS):
            owners = config["layout"][str(number)]
            assert owners[:4] == [first] * 4
            assert len(owners) == count[block]
            for linear in LINEARS:
                assert len(packed(saved, block, linear)[0]) == 8 * count[block]
            spans = [len(router) for router in routers(saved, block)]
            assert spans == [sum(owner <= router for owner in owners) for router in config["router_owners"]]
    assert seen == {0, 1}, "these runs should extend some blocks and leave others"


@pytest.mark.parametrize("start", STARTS)
def test_only_the_tasks_own_experts_and_routers_train(start: str, runs: Runs) -> None:
    for index, checkpoint in enumerate(chain(runs, start)):
        owners = adapter_config(checkpoint)["layout"]
        saved = tensors(checkpoint)
        expected = 0
        for number, block in enumerate(BLOCKS):
            own = owners[str(number)].count(index)
            width = sum(A.shape[1] + B.shape[0] for A, B in (packed(saved, block, linear) for linear in LINEARS))
            expected += own * 8 * width + routers(saved, block)[-1].numel()
        assert read_checkpoint(checkpoint).lineage.trainable_parameters == expected


def test_initial_experts_learn_on_the_warm_up_data(runs: Runs) -> None:
    """Warm-up: after the phase no expert is as it started (all B are zero then)."""
    checkpoint = chain(runs, "warmup", tasks=TASKS[:1])[0]
    saved = tensors(checkpoint)
    for block in BLOCKS:
        for linear in LINEARS:
            B = packed(saved, block, linear)[1]
            assert all(B[:, 8 * e : 8 * (e + 1)].any() for e in range(B.shape[1] // 8)), f"{block}.{linear}"
    phases = [line["phase"] for line in events(checkpoint.parent, "trained")][:3]
    assert phases == ["initial", "probe", "trained"]


class Watched:
    """The adapter's tensors after each step of a task's phases."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.after: dict[str, dict[str, Tensor]] = {}
        self.decisions: dict[str, BlockDecision] = {}
        for step in ("_add_probes", "_decide", "_extend"):
            patch.setattr(LlavaCMoe, step, self._watch(step, getattr(LlavaCMoe, step)))

    def _watch(self, step: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(method: LlavaCMoe, context: TaskContext) -> None:
            real(method, context)
            live = adapter_tensors(context.model)
            self.after[step] = {name: value.detach().clone().contiguous() for name, value in live.items()}
            self.decisions = method._decisions

        return call


@pytest.mark.parametrize("probes", [1, 3])
def test_probes_and_new_experts_start_where_they_should(
    probes: int, runs: Runs, new_base: Callable[[], LoadedBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = chain(runs, "first_task", tasks=TASKS[:1])[0]
    base = new_base()
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    monkeypatch.setattr(task_module, "load_base", lambda *arguments: base)
    watched = Watched(monkeypatch)
    options = settings(runs, "first_task", f"probe_experts={probes}", "alpha=2")
    child = runs.train(tmp_path / TASKS[1], "llava_cmoe", TASKS[1], *options, previous=parent)
    for name, value in base.model.state_dict().items():
        assert same_bits(value, before[name]), f"base: {name}"

    old, end = tensors(parent), tensors(child)
    fresh, trained, extended = (watched.after[step] for step in ("_add_probes", "_decide", "_extend"))
    assert any(decision.extend for decision in watched.decisions.values())
    for block in BLOCKS:
        decision = watched.decisions[block]
        (router,) = routers(old, block)
        assert same_bits(routers(fresh, block)[1][:4], router), "the probes' router copies the last one"
        assert not torch.equal(routers(trained, block)[1], routers(fresh, block)[1]), "probes did not train"
        assert same_bits(routers(extended, block)[1][:4], router)
        assert len(routers(extended, block)[1]) == 4 + decision.extend
        for name in (fresh, trained, extended, end):
            assert same_bits(routers(name, block)[0], router)
        for linear in LINEARS:
            A, B = packed(old, block, linear)
            for stage in (fresh, trained, extended, end):
                stage_A, stage_B = packed(stage, block, linear)
                assert same_bits(stage_A[:32], A)
                assert same_bits(stage_B[:, :32].contiguous(), B)
            probe_A, probe_B = packed(fresh, block, linear)
            assert len(probe_A) == 32 + 8 * probes
            mean_A = A.numpy().reshape(4, 8, -1).mean(0)
            mean_B = B.numpy().reshape(len(B), 4, 8).mean(1)
            for k in range(4, 4 + probes):
                np.testing.assert_allclose(probe_A[8 * k : 8 * k + 8].numpy(), mean_A, atol=1e-6)
                np.testing.assert_allclose(probe_B[:, 8 * k : 8 * k + 8].numpy(), mean_B, atol=1e-6)
            source_A, source_B = packed(trained, block, linear)
            assert not torch.equal(source_B, probe_B), "probes did not train"
            rows = slice(8 * decision.most_active, 8 * decision.most_active + 8)
            new_A, new_B = packed(extended, block, linear)
            assert len(new_A) == 32 + 8 * decision.extend
            for k in range(4, 4 + decision.extend):
                assert same_bits(new_A[8 * k : 8 * k + 8], source_A[rows])
                assert same_bits(new_B[:, 8 * k : 8 * k + 8].contiguous(), source_B[:, rows].contiguous())
            if decision.extend:
                assert not torch.equal(packed(end, block, linear)[1], new_B), "new experts did not train"
        assert not torch.equal(routers(end, block)[1], routers(extended, block)[1]), "the router did not train"


def test_probe_training_has_its_own_rate_and_length(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings: list[tuple[float, int, int]] = []
    real = TaskTrainer.train

    def spy(self: TaskTrainer) -> Any:
        trainings.append((self.config.learning_rate, self.steps, len(self.train_dataset)))  # type: ignore[arg-type]
        return real(self)

    monkeypatch.setattr(TaskTrainer, "train", spy)
    parent = chain(runs, "first_task", tasks=TASKS[:1])[0]
    options = settings(runs, "first_task", "probe_min_steps=1", "probe_epochs=3", "probe_held_out=0.25")
    runs.train(tmp_path / TASKS[1], "llava_cmoe", TASKS[1], *options, previous=parent)
    probe, main = trainings
    assert probe == (pytest.approx(0.015), 4, 9), "12 records, 3 of them measured; 9 three times in batches of 8"
    assert main == (0.01, 4, 24)


def test_balance_weights_of_probes_and_task(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase has its own; also when the probes were sealed by an interrupted run."""
    weights: list[float] = []
    real = TaskTrainer.train

    def spy(self: TaskTrainer) -> Any:
        weights.append(self.model.method._balance_weight)  # type: ignore[union-attr]
        return real(self)

    parent = chain(runs, "first_task", tasks=TASKS[:1])[0]
    options = settings(runs, "first_task", "balance_weight=0.25", "probe_balance_weight=0.5", "probe_min_steps=1")
    monkeypatch.setattr(TaskTrainer, "train", spy)
    runs.train(tmp_path / "whole" / TASKS[1], "llava_cmoe", TASKS[1], *options, previous=parent)
    assert weights == [0.5, 0.25]
    with monkeypatch.context() as patch:
        patch.setattr(LlavaCMoe, "_decide", kill)
        with pytest.raises(Killed):
            runs.train(tmp_path / TASKS[1], "llava_cmoe", TASKS[1], *options, previous=parent)
    runs.train(tmp_path / TASKS[1], "llava_cmoe", TASKS[1], *options, previous=parent)
    assert weights[2:] == [0.5, 0.25]


def test_the_loss_holds_the_balance_loss_however_the_batch_is_cut(runs: Runs, tiny_base: LoadedBase) -> None:
    """Oracle: the gate of each sample alone, so without padding, from each block's own input."""
    method = method_of("options.balance_weight=0.5")
    model = load_adapter(tiny_base.model, chain(runs, "first_task")[1], trainable=True)
    folder = runs.benchmark.parent / TASKS[1]
    dataset = train_dataset(
        tiny_base, load_train(folder / "train.json", folder / "images")[:8], folder / "images", 2048
    )
    trained, plain = TrainedModel(model, method, 8).eval(), TrainedModel(model, Method(lora()), 8).eval()
    (whole,) = train_batches(tiny_base, dataset, 8)
    answers = (whole["labels"] != -100).sum()
    expected = 0.0
    inputs: dict[str, Tensor] = {}
    for name, layer in expert_layers(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    cut = torch.zeros(())
    for batch in train_batches(tiny_base, dataset, 1):
        with torch.no_grad():
            cut += trained(**batch, num_items_in_batch=answers)["loss"]
        for name, layer in expert_layers(model).items():
            weight = layer.routers.instance[-1].weight.detach().double()  # type: ignore[operator]
            logits = inputs[name][0].detach().double() @ weight.T
            picked = torch.zeros_like(logits).scatter(1, logits.topk(2, dim=1).indices, 1.0)
            share, probability = picked.sum(0) / picked.sum(), logits.softmax(1).mean(0)
            expected += 0.5 * logits.shape[1] * float(share @ probability) / 8
    with torch.no_grad():
        together = trained(**whole, num_items_in_batch=answers)["loss"]
        alone = plain(**whole, num_items_in_batch=answers)["loss"]
    assert float(together - alone) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(cut, together, rtol=1e-5, atol=0)


def test_gradient_checkpointing_changes_no_bit(runs: Runs, tmp_path: Path) -> None:
    first, second = chain(runs, "first_task")[:2]
    options = [*settings(runs, "first_task"), "training.gradient_checkpointing=true"]
    again = runs.train(tmp_path / TASKS[1], "llava_cmoe", TASKS[1], *options, previous=first)
    for name, value in tensors(second).items():
        assert same_bits(tensors(again)[name], value), name


def test_probe_records_are_disjoint_parts_of_a_share(runs: Runs) -> None:
    folder = runs.benchmark.parent / TASKS[0]
    records = load_train(folder / "train.json", folder / "images")
    method = method_of("options.probe_share=0.5")
    train, held_out = method._probe_split(records)
    assert (len(train), len(held_out)) == (10, 2)
    assert len({record.id for record in [*train, *held_out]}) == 12
    for count in (2, 3):
        train, held_out = method_of("options.probe_share=0.01")._probe_split(records[:count])
        assert (len(train), len(held_out)) == (1, 1)
    with pytest.raises(ClmoeError, match="at least 2 training records"):
        method._probe_split(records[:1])


@pytest.mark.parametrize("start", STARTS)
def test_with_a_known_router_nothing_is_forgotten(start: str, runs: Runs, tmp_path: Path) -> None:
    """The lines of every prediction are the same right after a task and at the sequence's end."""
    checkpoints = chain(runs, start)

    def lines(checkpoint: Path, task: str, locator: str) -> str:
        run = runs.evaluate(checkpoint, tmp_path / checkpoint.name, tasks=task, locator=locator)
        return (run / "predictions" / checkpoint.name / f"{task}.{locator}.jsonl").read_text()

    others = []
    for checkpoint, task in zip(checkpoints, TASKS, strict=True):
        immediate = lines(checkpoint, task, "oracle")
        assert lines(checkpoints[-1], task, "oracle") == immediate
        others.append(lines(checkpoints[-1], task, "last").replace(TASKS[-1], task) != immediate)
    assert any(others[:-1]), "the newest router answers as the task's own: this shows nothing"


def test_a_tasks_logits_are_bit_identical_at_the_end(runs: Runs, new_base: Callable[[], LoadedBase]) -> None:
    checkpoints = chain(runs, "first_task")
    bases = [new_base() for _ in checkpoints]
    batch = prompt_batch(bases[0], ["What is it?", "How many things are there?"])
    models = [load_adapter(b.model, c, trainable=False).eval() for b, c in zip(bases, checkpoints, strict=True)]
    for index, model in enumerate(models):
        own = answer(model, batch, [index] * 2)
        assert same_bits(answer(models[-1], batch, [index] * 2), own)
        assert index == 3 or not torch.equal(answer(models[-1], batch, [3] * 2), own)


def answer(model: Any, batch: dict[str, Tensor], chosen: list[int]) -> Tensor:
    with torch.no_grad(), routing(RouteSelection(router=torch.tensor(chosen))):
        return adapted_base(model)(**batch).logits


def test_routers_mixed_in_a_batch_equal_one_by_one(runs: Runs, tiny_base: LoadedBase) -> None:
    model = load_adapter(tiny_base.model, chain(runs, "first_task")[-1], trainable=False).eval()
    batch = prompt_batch(tiny_base, ["What is it?"] * 6)
    chosen = [3, 0, 1, 1, 2, 0]
    together = answer(model, batch, chosen)
    for row, router in enumerate(chosen):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        torch.testing.assert_close(together[row], answer(model, one, [router])[0], atol=1e-5, rtol=1e-5)
    assert (together - answer(model, batch, [2] * 6)).abs().max() > 1e-3


def lora() -> Config:
    return tiny_config("lora", Path("nowhere"))


def method_of(*overrides: str) -> LlavaCMoe:
    return LlavaCMoe(tiny_config("llava_cmoe", Path("nowhere"), "adapter.train_projector=false", *overrides))


@pytest.mark.parametrize("start", STARTS)
def test_a_samples_tasks_router_serves_it(start: str, runs: Runs, tiny_base: LoadedBase) -> None:
    """With warm-up the first router is the initial experts' own, so a task's is one further."""
    model = load_adapter(tiny_base.model, chain(runs, start)[-1], trainable=False)
    chosen = method_of(*settings(runs, start)).selection(model, torch.tensor([1, 2, 0]))
    assert chosen.router.tolist() == ([2, 3, 1] if start == "warmup" else [1, 2, 0])  # type: ignore[union-attr]


def test_probes_are_measured_on_records_that_they_did_not_train_on(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = chain(runs, "first_task", tasks=TASKS[:1])[0]
    measured: list[dict[str, Tensor]] = []
    real = LlavaCMoe._decide

    def decide_watched(self: LlavaCMoe, context: TaskContext) -> None:
        _, held_out = self._probe_split(context.records)
        measured.extend(measure_activations(context, records, "frequency") for records in (held_out, context.records))
        real(self, context)

    monkeypatch.setattr(LlavaCMoe, "_decide", decide_watched)
    output = tmp_path / TASKS[1]
    runs.train(output, "llava_cmoe", TASKS[1], *settings(runs, "first_task"), previous=parent)
    for block, row in plan(output)[-1]["blocks"].items():
        held_out, all_records = (values[block].tolist() for values in measured)
        assert row["activations"] == held_out != all_records


def test_the_options_decide_what_a_vae_is_fitted_on(runs: Runs, new_base: Callable[[], LoadedBase]) -> None:
    """Feature, number of records, and a seed of the task's own."""
    samples = 10
    key = [*settings(runs, "first_task"), "locator.feature=pooled", f"locator.samples={samples}"]
    made = runs.chain("llava_cmoe", *key, tasks=TASKS[:2])
    for index, checkpoint in enumerate(made):
        folder, base = runs.benchmark.parent / TASKS[index], new_base()
        records = sample_records(load_train(folder / "train.json", folder / "images"), samples, 0)
        batches = prompt_batches(base, prompt_dataset(base, first_questions(records), folder / "images"), samples)
        with torch.no_grad():
            (features,) = (last_prompt_features(base.model, batch, "pooled") for batch in batches)
        config = read_checkpoint(checkpoint).config
        expected = fit_vae(features, VaeOptions(**config.locator.options), seed=index).state_dict()
        saved = load_file(checkpoint / "locator.safetensors")
        for name in ("shift", "scale", "noise"):
            torch.testing.assert_close(saved[f"vae.{index}.{name}"], expected[name], rtol=1e-4, atol=1e-5)


def test_the_probe_seed_changes_the_probes_alone(runs: Runs, tmp_path: Path) -> None:
    """Without extension in either plan the task's training is the same, bit for bit."""
    parent = chain(runs, "first_task", tasks=TASKS[:1])[0]
    made = []
    for seed in (0, 1):
        options = settings(runs, "first_task", "alpha=-9", f"probe_seed={seed}")
        made.append(runs.train(tmp_path / str(seed) / TASKS[1], "llava_cmoe", TASKS[1], *options, previous=parent))
    plans = [plan(checkpoint)[-1]["blocks"] for checkpoint in made]
    assert all(row["added"] == 0 for blocks in plans for row in blocks.values()), "alpha = -9: no probe passes"
    assert plans[0] != plans[1]
    first, second = (tensors(checkpoint) for checkpoint in made)
    assert all(same_bits(first[name], second[name]) for name in first)


def test_a_missing_warm_up_file_is_named_before_the_model_is_loaded(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task_module, "load_base", None)
    options = [*settings(runs, "warmup"), "options.warmup_train=nowhere/train.json"]
    with pytest.raises(SystemExit):
        runs.train(tmp_path / "run" / TASKS[0], "llava_cmoe", TASKS[0], *options)
    assert "nowhere/train.json does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_samples_are_located_and_the_task_is_recorded(runs: Runs, tmp_path: Path) -> None:
    checkpoint = chain(runs, "first_task")[2]
    run = runs.evaluate(checkpoint, tmp_path)
    found = []
    for task in THREE:
        rows = [
            json.loads(line) for line in (run / "predictions" / TASKS[2] / f"{task}.jsonl").read_text().splitlines()
        ]
        share = 100 * sum(row["task"] == task for row in rows) / len(rows)
        summary = json.loads((run / "predictions" / TASKS[2] / f"{task}.json").read_text())
        assert summary["located"] == pytest.approx(share)
        assert {row["task"] for row in rows} <= set(THREE)
        found.append(share)
    assert sum(found) / 3 >= 70, f"the tasks' questions differ, so most samples are found: {found}"
    assert (run / "immediate.csv").exists()


def test_extend_none_trains_everything_and_adds_nothing(runs: Runs) -> None:
    first, second = chain(runs, "first_task", "extend=none", tasks=TASKS[:2])
    old, new = tensors(first), tensors(second)
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert new[name].shape == value.shape
        assert not torch.equal(new[name], value), f"{name} did not train"
    assert [row["blocks"] for row in plan(second)] == [{}, {}]
    assert adapter_config(second)["router_owners"] == [0]
    assert {line["phase"] for line in events(second.parent, "trained")} == {"trained"}
    assert {name.split(".")[1] for name in load_file(second / "locator.safetensors")} == {"0", "1"}


def test_extend_none_answers(runs: Runs, tmp_path: Path) -> None:
    run = runs.evaluate(chain(runs, "first_task", "extend=none", tasks=TASKS[:2])[1], tmp_path)
    rows = (run / "predictions" / TASKS[1] / f"{TASKS[0]}.jsonl").read_text().splitlines()
    assert {json.loads(row)["task"] for row in rows} <= set(TASKS[:2])


@pytest.mark.parametrize("where", ["every", "random"])
def test_ablations_of_where_to_extend(where: str, runs: Runs) -> None:
    """The probes are the same, so the plan differs only in what was added."""
    probed = plan(chain(runs, "first_task")[1])[1]["blocks"]
    second = chain(runs, "first_task", f"extend={where}", tasks=TASKS[:2])[1]
    mine = plan(second)[1]["blocks"]
    decisions = {block: read_decision(row) for block, row in mine.items()}
    assert decisions == {block: read_decision(row) for block, row in probed.items()}
    added = {block: row["added"] for block, row in mine.items()}
    assert added == choose_blocks(decisions, where, seed=0 + 1)  # type: ignore[arg-type]
    for number, block in enumerate(BLOCKS):
        assert adapter_config(second)["layout"][str(number)] == [0] * 4 + [1] * added[block]


def test_activation_by_logit(runs: Runs, tmp_path: Path) -> None:
    parent = chain(runs, "first_task", tasks=TASKS[:1])[0]
    child = runs.train(tmp_path / TASKS[1], "llava_cmoe", TASKS[1], *settings(runs, "first_task", "activation=logit"),
                       previous=parent)  # fmt: skip
    for row in plan(child)[1]["blocks"].values():
        assert sum(row["activations"]) != pytest.approx(2), "not shares"
        assert row["added"] == int(row["activations"][4] > max(row["threshold"], 0))


class Killed(BaseException):
    """Not an Exception: nobody may catch it, as nobody catches kill -9."""


def kill(*unused: Any, **also_unused: Any) -> None:
    raise Killed


def second_training(patch: pytest.MonkeyPatch) -> None:
    real = TaskTrainer.train
    calls = iter(range(1))

    def train(self: TaskTrainer) -> Any:
        if next(calls, None) is None:
            raise Killed
        return real(self)

    patch.setattr(TaskTrainer, "train", train)


MOMENTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "probes_trained": lambda patch: patch.setattr(LlavaCMoe, "_decide", kill),
    "extended": second_training,
    "trained": lambda patch: patch.setattr(LlavaCMoe, "end_task", kill),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_after_a_phase_a_rerun_ends_in_the_same_bytes(
    moment: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = chain(runs, "first_task")[:2]
    output, options = tmp_path / TASKS[1], settings(runs, "first_task")
    with monkeypatch.context() as patch:
        MOMENTS[moment](patch)
        with pytest.raises(Killed):
            runs.train(output, "llava_cmoe", TASKS[1], *options, previous=first)
    runs.train(output, "llava_cmoe", TASKS[1], *options, previous=first)
    assert contents(output) == contents(second)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    trained = [line["phase"] for line in events(tmp_path, "trained")]
    assert sorted(trained) == ["probe", "trained"], "no phase was trained twice to its end"


def test_killed_after_the_warm_up_a_rerun_ends_in_the_same_bytes(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, options = tmp_path / TASKS[0], settings(runs, "warmup")
    with monkeypatch.context() as patch:
        patch.setattr(LlavaCMoe, "_add_probes", kill)
        with pytest.raises(Killed):
            runs.train(output, "llava_cmoe", TASKS[0], *options)
    runs.train(output, "llava_cmoe", TASKS[0], *options)
    assert contents(output) == contents(chain(runs, "warmup")[0])
    assert [line["phase"] for line in events(tmp_path, "trained")] == ["initial", "probe", "trained"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["options.initial_experts_from=warmup"], "options.warmup_train and options.warmup_images are needed"),
        (["adapter.router_top_k=1"], "adapter.router_top_k must be at least 2"),
        (["adapter.experts=1", "adapter.router_top_k=null"], "adapter.router_top_k must be at least 2"),
        (["adapter.router_scope=per_linear"], "set adapter.router_scope=per_block"),
        (["adapter.train_projector=true"], "set adapter.train_projector=false"),
        (["adapter.experts=1"], "adapter.router_top_k 2 takes every one of the 2 experts and probes"),
        (["adapter.router_top_k=null"], "activation=frequency needs adapter.router_top_k"),
        (["options.probe_experts=0"], "probe_experts"),
        (["options.probe_epochs=0"], "probe_epochs"),
        (["options.probe_share=0"], "probe_share"),
        (["options.probe_share=1.5"], "probe_share"),
        (["options.probe_held_out=1"], "probe_held_out"),
        (["options.extend=some"], "options.extend: 'some' is not one of"),
        (["options.decider=vae"], "decider is now locator"),
        (["options.feature=pooled"], "feature is now locator.feature"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ClmoeError, match=message):
        method_of(*overrides)


def test_a_dense_gate_works_with_logits() -> None:
    method_of("adapter.router_top_k=null", "options.activation=logit")
