"""CL-MoE end to end on the tiny LLaVA: every file against closed forms of the saved phi and theta; then its functions.

phi_t is the adapter as training left it: what the same task gives from the same parent with
``options.consolidation=none``.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from clmoe.bases.inputs import train_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.data.batches import sample_records
from clmoe.errors import ClmoeError
from clmoe.experts.forward import adapted_base
from clmoe.experts.layer import expert_layers
from clmoe.experts.model import load_adapter
from clmoe.experts.routing import NEWEST_ROUTER, RouteTrace, routing
from clmoe.methods.clmoe import ClMoe
from clmoe.methods.consolidation import (
    consolidate_delta,
    consolidate_factors,
    factorise,
    keep_weights,
    salient_experts,
)
from clmoe.methods.statistics import count_gates, load_statistics, save_statistics
from clmoe.utils.tensors import same_bits
from tests.methods.helpers import same_adapter, task_data, task_records, watch_inputs
from tests.runs import Runs, tensors
from tests.support import TASKS, tiny_config, train_batches

E, GAMMA = 4, 0.7
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def parent(runs: Runs) -> Path:
    """theta_1: the checkpoint of the first task."""
    return runs.chain("clmoe", tasks=TASKS[:1])[0]


@pytest.fixture(scope="module")
def phi(runs: Runs, parent: Path) -> Path:
    """phi_2: the second task, not consolidated."""
    return second(runs, parent, "consolidation=none")


def second(runs: Runs, parent: Path, *options: str) -> Path:
    """The second task from ``parent`` with other options of the method; trained only once."""
    key = ("second", *options)
    if key not in runs.made:
        output = runs.root / "-".join(key).replace("=", "_") / TASKS[1]
        settings = [f"options.{option}" for option in options]
        runs.made[key] = [runs.train(output, "clmoe", TASKS[1], *settings, previous=parent)]
    return runs.made[key][0]


def top(values: np.ndarray, k: int = 2) -> set[int]:
    return set(np.lexsort((np.arange(len(values)), -values))[:k].tolist())


def mixed(old: Tensor, new: Tensor, keep: np.ndarray) -> Tensor:
    """``keep * old + (1 - keep) * new``; ``keep`` broadcasts against the tensors."""
    result = keep * old.numpy().astype(np.float64) + (1 - keep) * new.numpy().astype(np.float64)
    return torch.from_numpy(result.astype(np.float32))


def keep_of(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    specific = top(now) - top(before)
    return np.array([1 - GAMMA if i in specific else GAMMA for i in range(E)])


def assert_consolidated(
    theta_1: Path, phi_2: Path, theta_2: Path, kind: str = "gate_mean", routers: bool = False
) -> None:
    """Every tensor of ``theta_2`` equals the closed form bit for bit; the gates come from the statistic ``kind``."""
    old, new, result = tensors(theta_1), tensors(phi_2), tensors(theta_2)
    history = load_statistics(theta_2 / "statistics.safetensors")
    assert result.keys() == new.keys()
    expected = dict(new)
    for name in history[1]:
        before, now = (task[name][kind].double() for task in history)
        keep = torch.from_numpy(keep_of(now.numpy(), before.numpy()))
        stem, linear = f"{PREFIX}{name}", name.rpartition(".")[2]
        A, B = f"{stem}.clmoe_experts.{linear}.A", f"{stem}.clmoe_experts.{linear}.B"
        per_rank = keep.repeat_interleave(old[A].shape[0] // E)
        weights = {A: per_rank[:, None], B: per_rank[None, :]}
        if routers:
            weights[f"{stem}.clmoe_routers.instance.0.weight"] = keep[:, None]
        expected |= {key: mixed(old[key], new[key], weight.numpy()) for key, weight in weights.items()}
        gates = f"{stem}.clmoe_routers.task.gates"
        expected[gates] = torch.stack([before / before.sum(), now / now.sum()]).float()
        assert same_bits(result[gates][:1], old[gates]), "older rows stay"
    for name, value in result.items():
        if name.endswith("task.gates"):
            torch.testing.assert_close(value, expected[name])
        else:
            assert same_bits(value, expected[name]), name


def test_second_task_is_the_closed_form_of_phi_and_theta(runs: Runs, parent: Path, phi: Path) -> None:
    theta = runs.chain("clmoe")[1]
    before, now = load_statistics(theta / "statistics.safetensors")
    specific = [top(now[n]["gate_mean"].numpy()) - top(before[n]["gate_mean"].numpy()) for n in now]
    assert any(specific), "no expert is task-specific: this data would not tell gamma from 1 - gamma"
    assert_consolidated(parent, phi, theta)


def test_only_a_later_task_is_consolidated_and_training_moved_everything(runs: Runs, parent: Path, phi: Path) -> None:
    assert same_adapter(runs.chain("clmoe", "options.consolidation=none", tasks=TASKS[:1])[0], parent)
    old, new = tensors(parent), tensors(phi)
    for name in old:
        if "gates" not in name:
            assert not torch.equal(old[name], new[name]), f"{name} did not train, so its test shows nothing"


def test_option_momentum_on_routers(runs: Runs, parent: Path, phi: Path) -> None:
    theta = second(runs, parent, "momentum_on=experts_and_routers")
    assert_consolidated(parent, phi, theta, routers=True)


def test_option_topk_counts_decides_gates_and_salience(runs: Runs) -> None:
    counted = "options.statistic=topk_counts"
    parent, theta = runs.chain("clmoe", counted)
    phi = runs.train(runs.root / "phi-counts" / TASKS[1], "clmoe", TASKS[1], counted, "options.consolidation=none",
                     previous=parent)  # fmt: skip
    assert_consolidated(parent, phi, theta, kind="topk_counts")


def test_option_delta_merges_products(runs: Runs, parent: Path, phi: Path) -> None:
    """Each linear is merged by ``consolidate_delta``, which has an oracle below."""
    theta = second(runs, parent, "merge_space=delta")
    old, new, result = tensors(parent), tensors(phi), tensors(theta)
    before, now = load_statistics(theta / "statistics.safetensors")
    for name in now:
        keep = torch.from_numpy(keep_of(now[name]["gate_mean"].numpy(), before[name]["gate_mean"].numpy()))
        A, B = (f"{PREFIX}{name}.clmoe_experts.{name.rpartition('.')[2]}.{factor}" for factor in "AB")
        merged = consolidate_delta((old[A], old[B]), (new[A], new[B]), keep)
        assert same_bits(result[A], merged[0]) and same_bits(result[B], merged[1]), name


def test_statistics_are_the_mean_gate_over_real_tokens(
    runs: Runs, tiny_base: LoadedBase, mini_yaml: Path, tmp_path: Path
) -> None:
    """Oracle: gates from each linear's own input without dropout, one record at a time so that nothing is padded."""
    phi = runs.train(tmp_path / TASKS[1], "clmoe", TASKS[1], "adapter.dropout=0.2")
    model = load_adapter(tiny_base.model, phi, trainable=False).eval()
    layers = expert_layers(model)
    inputs = watch_inputs(layers)
    gates: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    for batch in train_batches(tiny_base, task_data(tiny_base, mini_yaml, TASKS[1]), 1):
        batch.pop("labels")
        with torch.no_grad(), routing(NEWEST_ROUTER):
            adapted_base(model).model(**batch)
        for name, x in inputs.items():
            logits = x[0].double().numpy() @ layers[name].routers.instance[0].weight.double().numpy().T
            exponent = np.exp(logits - logits.max(1, keepdims=True))
            gates[name].append(exponent / exponent.sum(1, keepdims=True))
    saved = load_statistics(phi / "statistics.safetensors")[0]
    for name, parts in gates.items():
        tokens = np.concatenate(parts)
        np.testing.assert_allclose(saved[name]["gate_mean"].numpy(), tokens.mean(0), atol=1e-6)
        assert int(saved[name]["tokens"]) == len(tokens)
        picks = np.argsort(-tokens, axis=1, kind="stable")[:, :2]
        counted = np.bincount(picks.ravel(), minlength=E)
        assert np.abs(saved[name]["topk_counts"].numpy() - counted).sum() <= 4, "at most a few near ties may differ"


def history(*tables: dict[str, list[float]]) -> list[dict[str, dict[str, Tensor]]]:
    return [{n: {"gate_mean": torch.tensor(g, dtype=torch.float64)} for n, g in table.items()} for table in tables]


def method(*options: str) -> ClMoe:
    return ClMoe(tiny_config("clmoe", Path("nowhere"), *(f"options.{option}" for option in options)))


PAST = history(
    {"a": [9, 8, 1, 0], "b": [0, 1, 8, 9]},
    {"a": [0, 8, 9, 1], "b": [9, 8, 0, 1]},
    {"a": [9, 8, 0, 1], "b": [0, 8, 9, 1]},
)
KEEP, GIVE = 0.7, 1 - 0.7


def test_before_is_the_last_task_or_any() -> None:
    last = method("before=last").keep_by_module(PAST)
    assert last["a"].tolist() == [GIVE, KEEP, KEEP, KEEP], "expert 0 was salient in task 1 only"
    assert last["b"].tolist() == [KEEP, KEEP, GIVE, KEEP]
    union = method("before=any").keep_by_module(PAST)
    assert union["a"].tolist() == union["b"].tolist() == [KEEP] * 4


def test_global_salience_ranks_experts_once_for_the_whole_model() -> None:
    sets = method("salience=global").salient_sets(PAST)
    assert [s["a"] for s in sets] == [s["b"] for s in sets], "sums [9 9 9 9], [9 16 9 2], [9 16 9 2]"
    assert [s["a"] for s in sets] == [{0, 1}, {1, 0}, {1, 0}]
    assert method().salient_sets(PAST)[0] == {"a": {0, 1}, "b": {3, 2}}


@pytest.mark.parametrize("option", ["beta=1.5", "gamma=-0.1", "top_k=0", "samples=0"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(ClmoeError, match=option.split("=")[0]):
        method(option)


def test_options_of_the_counts(runs: Runs, parent: Path, tiny_base: LoadedBase) -> None:
    theta = second(runs, parent, "samples=7", "top_k=3")
    records, images = task_records(runs.benchmark, TASKS[1])
    dataset = train_dataset(tiny_base, sample_records(records, 7, 0), images, 2048)
    tokens = sum(len(dataset[row].input_ids) for row in range(7))
    for values in load_statistics(theta / "statistics.safetensors")[1].values():
        assert (int(values["tokens"]), int(values["topk_counts"].sum())) == (tokens, 3 * tokens)


def test_beta_mixes_the_instance_gate_with_the_chosen_tasks_gate(runs: Runs, tiny_base: LoadedBase) -> None:
    model = load_adapter(tiny_base.model, runs.chain("clmoe")[1], trainable=False)
    layer = next(iter(expert_layers(model).values()))
    x = torch.randn(2, 3, layer.routers.instance[0].weight.shape[1])
    for beta in (0.25, 1):
        selection = method(f"beta={beta}").selection(model, torch.tensor([1, 0]))
        with torch.no_grad(), routing(selection, trace := RouteTrace()):
            gate = layer.routers(x)
        chosen = layer.routers.task.gates[[1, 0]].unsqueeze(1)
        torch.testing.assert_close(gate, beta * trace.outputs[layer.name].gate + (1 - beta) * chosen)


# ---- Statistics and consolidation as functions, against loops and dense algebra


Factors = tuple[Tensor, Tensor]
R, DIN, DOUT = 3, 11, 7
SPACES = (consolidate_factors, consolidate_delta)


def draw(seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(E * R, DIN, generator=generator), torch.randn(DOUT, E * R, generator=generator)


def product(factors: Factors, expert: int) -> np.ndarray:
    A, B = (tensor.double().numpy() for tensor in factors)
    rows = slice(expert * R, (expert + 1) * R)
    return B[:, rows] @ A[rows]


# ---- Statistics


@pytest.mark.parametrize("top_k", [1, 2])
def test_counts_equal_a_loop_over_real_tokens(top_k: int) -> None:
    """Oracle: one token after the other. Ties go to the lower index; padding, if counted, would favour expert 3."""
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(6, 9, E, generator=generator).softmax(-1)
    gate[0] = torch.tensor([0.1, 0.4, 0.1, 0.4])
    mask = (torch.arange(9) < torch.randint(1, 10, (6, 1), generator=generator)).long()
    gate[mask == 0] = one_hot(torch.tensor(3), E).float()
    total, picks = np.zeros(E), np.zeros(E, dtype=np.int64)
    for values in gate[mask.bool()].double().numpy():
        total += values
        for expert in sorted(range(E), key=lambda i: (-values[i], i))[:top_k]:
            picks[expert] += 1
    found = count_gates(gate, mask, top_k)
    np.testing.assert_allclose(found[0].numpy(), total, rtol=1e-12)
    assert found[1].tolist() == picks.tolist() and int(found[2]) == int(mask.sum())
    assert [part.dtype for part in found] == [torch.float64, torch.int64, torch.int64]


def statistics(task: int) -> dict[str, dict[str, Tensor]]:
    """Values that differ by task, under names with dots like those of modules."""
    return {
        f"model.layers.{block}.mlp.up_proj": {"gate_mean": torch.tensor(task).double(), "tokens": torch.tensor(block)}
        for block in (0, 1, 10)
    }


def test_history_keeps_its_order_beyond_ten_tasks(tmp_path: Path) -> None:
    previous = None
    for task in range(12):
        folder = tmp_path / f"{task:02}"
        folder.mkdir()
        assert len(save_statistics(previous, folder / "statistics.safetensors", statistics(task))) == task + 1
        previous = folder
    for task, loaded in enumerate(load_statistics(tmp_path / "11" / "statistics.safetensors")):
        expected = statistics(task)
        assert loaded.keys() == expected.keys()
        for name, values in expected.items():
            assert loaded[name].keys() == values.keys()
            assert all(same_bits(loaded[name][kind], value) for kind, value in values.items()), (task, name)


# ---- Salience


def test_salient_experts_are_the_largest_and_ties_go_to_the_lower_index() -> None:
    for scores, top_k, expected in (([0.1, 0.3, 0.3, 0.3], 2, {1, 2}), ([0.25] * 64, 1, {0}), ([0.6, 0.4], 5, {0, 1})):
        assert salient_experts(torch.tensor(scores, dtype=torch.float64), top_k) == expected


# ---- Consolidation


@pytest.mark.parametrize("consolidate", SPACES)
def test_gamma_one_keeps_every_non_specific_expert_bit_for_bit(consolidate: Callable[..., Factors]) -> None:
    """The bits include the signs of zeros, and the arguments stay as they were."""
    old, new = draw(0), draw(1)
    old[0][0, :4] = torch.tensor([-0.0, 0.0, 1e-42, -3.0e38])
    new[0][0, :4] = torch.tensor([5.0, -0.0, 1.0, 3.0e38])
    given = [tensor.clone() for tensor in (*old, *new)]
    A, B = consolidate(old, new, keep_weights(now={1, 2}, before={2}, experts=E, gamma=1.0))
    for expert in range(E):
        rows, source = slice(expert * R, (expert + 1) * R), new if expert == 1 else old
        assert same_bits(A[rows], source[0][rows])
        assert same_bits(B[:, rows].contiguous(), source[1][:, rows].contiguous())
    assert all(same_bits(a, b) for a, b in zip(given, (*old, *new), strict=True))


@pytest.mark.parametrize("seeds", [(6, 7), (8, 8)])
def test_delta_is_the_best_rank_r_approximation_of_the_mixed_product(seeds: tuple[int, int]) -> None:
    """If the old and new products are equal, the result is that product."""
    old, new = (draw(seed) for seed in seeds)
    keep = keep_weights(now={0, 1}, before={1}, experts=E, gamma=0.7)
    merged = consolidate_delta(old, new, keep)
    assert {tensor.dtype for tensor in merged} == {torch.float32}
    for expert, weight in enumerate(keep.tolist()):
        U, S, Vh = np.linalg.svd(weight * product(old, expert) + (1 - weight) * product(new, expert))
        np.testing.assert_allclose(product(merged, expert), U[:, :R] * S[:R] @ Vh[:R], atol=2e-5)
    apart = np.abs(product(consolidate_factors(old, new, keep), 1) - product(merged, 1)).max() > 1e-2
    assert apart == (seeds[0] != seeds[1]), "the two spaces differ in general"


def test_factorise_fixes_signs_and_shares_the_spectrum() -> None:
    left, right = draw(9)[1].double(), draw(9)[0].double()
    A, B = factorise(left, right, R)
    torch.testing.assert_close((A, B), factorise(-left, -right, R))
    for column in B.t():
        assert column[column.abs().argmax()] > 0
    singular = np.linalg.svd((left @ right).numpy(), compute_uv=False)[:R]
    np.testing.assert_allclose((A @ A.t()).numpy(), np.diag(singular), atol=1e-9)
    np.testing.assert_allclose((B.t() @ B).numpy(), np.diag(singular), atol=1e-9)
