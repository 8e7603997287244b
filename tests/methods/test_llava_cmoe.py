"""LLaVA-CMoE end to end on the tiny LLaVA: older parts never change, and the plan says what was done."""

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

from clmoe.bases.inputs import prompt_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.data.batches import first_questions, sample_records
from clmoe.errors import ClmoeError
from clmoe.experts.forward import adapted_base, base_features
from clmoe.experts.layer import expert_layers
from clmoe.experts.model import adapter_tensors, load_adapter
from clmoe.experts.routing import RouterOutput, RouteTrace, routing
from clmoe.locators.vae import Options as VaeOptions
from clmoe.locators.vae import fit_vae
from clmoe.methods.base import Method, TaskContext
from clmoe.methods.llava_cmoe import LlavaCMoe
from clmoe.methods.probes import BlockDecision, choose_blocks, decide, measure_activations
from clmoe.train import task as task_module
from clmoe.train.checkpoint import read_checkpoint
from clmoe.train.loop import TaskTrainer, TrainedModel
from clmoe.utils.tensors import same_bits
from tests.methods.helpers import same_adapter, task_data, task_records, watch_inputs
from tests.runs import Killed, Runs, contents, events, kill, on_step, tensors
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
    """Runs on four tasks: those of the miniature benchmark, and the first one's records again under another name."""
    values = yaml.safe_load(runs.benchmark.read_text())
    values["name"] = "mini-of-four"
    values["tasks"].append({**values["tasks"][0], "name": TASKS[3]})
    benchmark = runs.benchmark.with_name("mini-of-four.yaml")
    benchmark.write_text(yaml.safe_dump(values, sort_keys=False))
    return Runs(tmp_path_factory.mktemp("runs-of-four"), runs.model, benchmark)


def settings(runs: Runs, start: str, *options: str) -> list[str]:
    """Overrides of a run; a warm-up trains on the third task's records."""
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
    return BlockDecision(**{name: value for name, value in row.items() if name != "added"})


def second(runs: Runs, output: Path, *options: str) -> Path:
    """The second task with more settings of its own, after a first task without warm-up."""
    parent = chain(runs, "first_task", tasks=TASKS[:1])[0]
    return runs.train(
        output / TASKS[1], "llava_cmoe", TASKS[1], *settings(runs, "first_task"), *options, previous=parent
    )


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_what_is_older_is_bit_identical_after_every_task(start: str, runs: Runs) -> None:
    checkpoints = chain(runs, start)
    for parent, child in pairwise(checkpoints):
        old, new = tensors(parent), tensors(child)
        for block in BLOCKS:
            for linear in LINEARS:
                (A, B), (later_A, later_B) = packed(old, block, linear), packed(new, block, linear)
                assert all(expert.any() for expert in B.split(8, 1)), f"{block}.{linear}: an expert did not train"
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
    """The plan fits the saved experts and routers; a block that is not extended still gets a router of the task."""
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


def test_probes_and_new_experts_start_where_they_should(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes, stages, decisions = 3, {}, {}

    def watch(step: str) -> None:
        real = getattr(LlavaCMoe, step)

        def call(method: LlavaCMoe, context: TaskContext) -> None:
            real(method, context)
            live = adapter_tensors(context.model)
            stages[step] = {name: value.detach().clone().contiguous() for name, value in live.items()}
            decisions.update(method._decisions)

        monkeypatch.setattr(LlavaCMoe, step, call)

    for step in ("_add_probes", "_decide", "_extend"):
        watch(step)
    end = tensors(second(runs, tmp_path, f"options.probe_experts={probes}", "options.alpha=2"))
    old = tensors(chain(runs, "first_task", tasks=TASKS[:1])[0])
    fresh, trained, extended = stages.values()
    assert any(decision.probed for decision in decisions.values())
    for block, decision in decisions.items():
        (router,) = routers(old, block)
        for stage in (fresh, extended):
            assert same_bits(routers(stage, block)[1][:4], router), "the newest router copies the last one"
        assert len(routers(extended, block)[1]) == 4 + decision.probed
        for before, after in ((fresh, trained), (extended, end)):
            assert not torch.equal(routers(after, block)[1], routers(before, block)[1]), "the router did not train"
        for linear in LINEARS:
            A, B = packed(old, block, linear)
            for stage in (*stages.values(), end):
                assert same_bits(routers(stage, block)[0], router)
                stage_A, stage_B = packed(stage, block, linear)
                assert same_bits(stage_A[:32], A) and same_bits(stage_B[:, :32].contiguous(), B)
            probe_A, probe_B = packed(fresh, block, linear)
            mean_A, mean_B = A.numpy().reshape(4, 8, -1).mean(0), B.numpy().reshape(len(B), 4, 8).mean(1)
            np.testing.assert_allclose(probe_A[32:].numpy(), np.tile(mean_A, (probes, 1)), atol=1e-6)
            np.testing.assert_allclose(probe_B[:, 32:].numpy(), np.tile(mean_B, (1, probes)), atol=1e-6)
            source_A, source_B = packed(trained, block, linear)
            assert not torch.equal(source_B, probe_B), "probes did not train"
            rows, copies = slice(8 * decision.most_active, 8 * decision.most_active + 8), decision.probed
            new_A, new_B = packed(extended, block, linear)
            assert torch.equal(new_A[32:], source_A[rows].repeat(copies, 1))
            assert torch.equal(new_B[:, 32:], source_B[:, rows].repeat(1, copies))
            assert not copies or not torch.equal(packed(end, block, linear)[1], new_B), "new experts did not train"


def test_each_phase_has_its_own_rate_length_and_balance_weight(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after the probes changes nothing. Of 12 records, 3 are measured; 9 train three times in batches of 8."""
    trainings: list[tuple[float, int, int, float]] = []
    real, ones = TaskTrainer.train, torch.ones(1, 1, 2)
    balanced = RouteTrace({"": RouterOutput(ones, ones, ones)})  # two equal experts, so that the balance loss is 1

    def spy(self: TaskTrainer) -> Any:
        loss = self.model.method.extra_loss(self.model, balanced, {"attention_mask": ones[0, :, :1]})  # type: ignore[operator, union-attr]
        trainings.append((self.config.learning_rate, self.steps, len(self.train_dataset), float(loss)))  # type: ignore[arg-type]
        return real(self)

    monkeypatch.setattr(TaskTrainer, "train", spy)
    options = ["probe_min_steps=1", "probe_epochs=3", "probe_held_out=0.25", "balance_weight=0.25"]
    options = [f"options.{option}" for option in [*options, "probe_balance_weight=0.5"]]
    with monkeypatch.context() as patch:
        patch.setattr(LlavaCMoe, "_decide", kill)
        with pytest.raises(Killed):
            second(runs, tmp_path, *options)
    second(runs, tmp_path, *options)
    assert trainings == [(pytest.approx(0.015), 4, 9, 0.5), (0.01, 4, 24, 0.25)]


def test_the_loss_holds_the_balance_loss_however_the_batch_is_cut(runs: Runs, tiny_base: LoadedBase) -> None:
    """Oracle: gates from each block's own input, one sample at a time, so without padding."""
    method = method_of("options.balance_weight=0.5")
    model = load_adapter(tiny_base.model, chain(runs, "first_task")[1], trainable=True)
    dataset = task_data(tiny_base, runs.benchmark, TASKS[1], 8)
    trained = TrainedModel(model, method, 8).eval()
    plain = TrainedModel(model, Method(tiny_config("lora", Path("nowhere"))), 8).eval()
    (whole,) = train_batches(tiny_base, dataset, 8)
    answers = (whole["labels"] != -100).sum()
    expected = 0.0
    inputs, cut = watch_inputs(expert_layers(model)), torch.zeros(())
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


def test_probe_records_are_disjoint_parts_of_a_share(runs: Runs) -> None:
    records, _ = task_records(runs.benchmark, TASKS[0])
    method = method_of("options.probe_share=0.5")
    train, held_out = method._probe_split(records)
    assert (len(train), len(held_out), len({record.id for record in [*train, *held_out]})) == (10, 2, 12)
    for count in (2, 3):
        train, held_out = method_of("options.probe_share=0.01")._probe_split(records[:count])
        assert (len(train), len(held_out)) == (1, 1)
    with pytest.raises(ClmoeError, match="at least 2 training records"):
        method._probe_split(records[:1])


@pytest.mark.parametrize("start", STARTS)
def test_with_a_known_task_nothing_is_forgotten(start: str, runs: Runs, new_base: Callable[[], LoadedBase]) -> None:
    """At the end, a task's logits are those of its own checkpoint, bit for bit; the newest router's logits differ.

    With warm-up, the first router belongs to the initial experts, so a task's router is one further.
    """
    checkpoints, method = chain(runs, start), method_of(*settings(runs, start))
    models = [load_adapter(new_base().model, folder, trainable=False).eval() for folder in checkpoints]
    batch = prompt_batch(new_base(), ["What is it?", "How many things are there?"])

    def logits(model: Any, task: int) -> Tensor:
        selection = method.selection(model, torch.tensor([task] * 2))
        if selection.router is not None:
            assert selection.router.tolist() == [task + (start == "warmup")] * 2
        with torch.no_grad(), routing(selection):
            return adapted_base(model)(**batch).logits

    for index, model in enumerate(models):
        own = logits(model, index)
        assert same_bits(logits(models[-1], index), own)
        assert index == 3 or not torch.equal(logits(models[-1], 3), own)


def method_of(*overrides: str) -> LlavaCMoe:
    return LlavaCMoe(tiny_config("llava_cmoe", Path("nowhere"), "adapter.train_projector=false", *overrides))


def test_probes_are_measured_on_records_that_they_did_not_train_on(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[dict[str, Tensor]] = []
    real = LlavaCMoe._decide

    def decide_watched(self: LlavaCMoe, context: TaskContext) -> None:
        _, held_out = self._probe_split(context.records)
        measured.extend(measure_activations(context, records, "frequency") for records in (held_out, context.records))
        real(self, context)

    monkeypatch.setattr(LlavaCMoe, "_decide", decide_watched)
    for block, row in plan(second(runs, tmp_path))[-1]["blocks"].items():
        held_out, all_records = (values[block].tolist() for values in measured)
        assert row["activations"] == held_out != all_records


def test_the_options_decide_what_a_vae_is_fitted_on(runs: Runs, new_base: Callable[[], LoadedBase]) -> None:
    """The options set the feature and the number of records; the seed is the task's own."""
    samples = 10
    key = [*settings(runs, "first_task"), "locator.feature=pooled", f"locator.samples={samples}"]
    made = runs.chain("llava_cmoe", *key, tasks=TASKS[:2])
    for index, checkpoint in enumerate(made):
        (records, images), base = task_records(runs.benchmark, TASKS[index]), new_base()
        questions = first_questions(sample_records(records, samples, 0))
        (batch,) = prompt_batches(base, prompt_dataset(base, questions, images), samples)
        features = base_features(load_adapter(base.model, checkpoint, trainable=False), batch, "pooled")
        config = read_checkpoint(checkpoint).config
        expected = fit_vae(features, VaeOptions(**config.locator.options), seed=index).state_dict()
        saved = load_file(checkpoint / "locator.safetensors")
        for name in ("shift", "scale", "noise"):
            torch.testing.assert_close(saved[f"vae.{index}.{name}"], expected[name], rtol=1e-4, atol=1e-5)


def test_the_probe_seed_changes_the_probes_alone(runs: Runs, tmp_path: Path) -> None:
    """If neither plan extends a block, the task's training is the same, bit for bit."""
    made = [second(runs, tmp_path / seed, "options.alpha=-9", f"options.probe_seed={seed}") for seed in "01"]
    plans = [plan(checkpoint)[-1]["blocks"] for checkpoint in made]
    assert all(row["added"] == 0 for blocks in plans for row in blocks.values()), "alpha = -9: no probe passes"
    assert plans[0] != plans[1]
    assert same_adapter(*made)


def test_a_missing_warm_up_file_is_named_before_the_model_is_loaded(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task_module, "load_base", None)
    options = [*settings(runs, "warmup"), "options.warmup_train=nowhere/train.json"]
    with pytest.raises(SystemExit):
        runs.train(tmp_path / "run" / TASKS[0], "llava_cmoe", TASKS[0], *options)
    assert "nowhere/train.json does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_extend_none_trains_everything_adds_nothing_and_answers(runs: Runs, tmp_path: Path) -> None:
    first, second = chain(runs, "first_task", "extend=none", tasks=TASKS[:2])
    old, new = tensors(first), tensors(second)
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert new[name].shape == value.shape
        assert not torch.equal(new[name], value), f"{name} did not train"
    assert [row["blocks"] for row in plan(second)] == [{}, {}]
    assert adapter_config(second)["router_owners"] == [0]
    assert {line["phase"] for line in events(second.parent, "trained")} == {"trained"}
    run = runs.evaluate(second, tmp_path)
    rows = (run / "predictions" / TASKS[1] / f"{TASKS[0]}.jsonl").read_text().splitlines()
    assert {json.loads(row)["task"] for row in rows} <= set(TASKS[:2])


@pytest.mark.parametrize("where", ["every", "random"])
def test_ablations_of_where_to_extend(where: str, runs: Runs) -> None:
    """The probes are the same as without the ablation, so the plan differs only in what was added."""
    probed = plan(chain(runs, "first_task")[1])[1]["blocks"]
    second = chain(runs, "first_task", f"extend={where}", tasks=TASKS[:2])[1]
    mine = plan(second)[1]["blocks"]
    decisions = {block: read_decision(row) for block, row in mine.items()}
    assert decisions == {block: read_decision(row) for block, row in probed.items()}
    added = {block: row["added"] for block, row in mine.items()}
    assert added == choose_blocks(decisions, where, seed=0 + 1)  # type: ignore[arg-type]
    for number, block in enumerate(BLOCKS):
        assert adapter_config(second)["layout"][str(number)] == [0] * 4 + [1] * added[block]


MOMENTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "initial experts trained": ("warmup", lambda patch: patch.setattr(LlavaCMoe, "_add_probes", kill)),
    "probes trained": ("first_task", lambda patch: patch.setattr(LlavaCMoe, "_decide", kill)),
    "extended": ("first_task", lambda patch: on_step(patch, 4)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_after_a_phase_a_rerun_ends_in_the_same_bytes(
    moment: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No phase is trained to its end twice. ``test_contract.py`` tests a kill at the very end."""
    start, interrupt = MOMENTS[moment]
    made, index = chain(runs, start), int(start == "first_task")
    task, previous = TASKS[index], made[0] if index else None
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(Killed):
            runs.train(tmp_path / task, "llava_cmoe", task, *settings(runs, start), previous=previous)
    runs.train(tmp_path / task, "llava_cmoe", task, *settings(runs, start), previous=previous)
    assert contents(tmp_path / task) == contents(made[index])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    phases = ["initial", "probe", "trained"][-2 if index else -3 :]
    assert [line["phase"] for line in events(tmp_path, "trained")] == phases


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
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ClmoeError, match=message):
        method_of(*overrides)
    method_of("adapter.router_top_k=null", "options.activation=logit")
