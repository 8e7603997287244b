"""The same training by other means gives the same losses and weights, bit for bit where nothing may differ."""

import math
from pathlib import Path

import pytest
import torch

from clmoe.bases.families import PROJECTOR
from clmoe.bases.inputs import train_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.data.batches import collate_train
from clmoe.data.records import load_train
from clmoe.experts.forward import adapted_base, enable_checkpointing
from clmoe.experts.model import adapter_tensors, attach_adapter
from clmoe.experts.routing import NEWEST_ROUTER, routing
from clmoe.methods import method_class
from clmoe.train.checkpoint import read_checkpoint
from clmoe.train.loop import BatchPlan, TrainedModel
from clmoe.utils.tensors import same_bits, trainable
from tests.runs import Runs, events, tensors
from tests.support import TASKS, tiny_config, train_batch, train_batches

METHODS = ["lora", "moelora"]
MIXED = TASKS[1]  # three of its records have no image


def trajectory(checkpoint: Path) -> list[float]:
    return [event["loss"] for event in events(checkpoint.parent, "step")]


def trained(runs: Runs, output: Path, method: str, *overrides: str) -> tuple[list[float], Path]:
    checkpoint = runs.train(output / MIXED, method, MIXED, *overrides)
    return trajectory(checkpoint), checkpoint


@pytest.fixture(scope="module", params=METHODS)
def reference(request: pytest.FixtureRequest, runs: Runs) -> tuple[str, list[float], Path]:
    method = request.param
    return method, *trained(runs, runs.root / f"reference-{method}", method)


@pytest.mark.parametrize("override", ["training.gradient_checkpointing=true", "training.workers=2", "seed=1"])
def test_bit_for_bit_the_same(
    override: str, reference: tuple[str, list[float], Path], runs: Runs, tmp_path: Path
) -> None:
    """Recomputation and loading in other processes change no bit; another seed shows that the comparison can fail."""
    method, losses, checkpoint = reference
    again, other = trained(runs, tmp_path, method, override)
    assert len(losses) == 4
    assert (again == losses) == (override != "seed=1")
    for name, value in tensors(checkpoint).items():
        assert same_bits(tensors(other)[name], value) == (override != "seed=1"), name


def test_training_is_adamw_written_out(runs: Runs, tiny_base: LoadedBase, tmp_path: Path) -> None:
    """The oracle is float64 without a Trainer: warm-up, cosine, clipping, decoupled decay, the projector's own rate."""
    steps, warmup, decay, longest, cut = 8, 2, 0.3, 0.05, 50
    rates = {False: 0.01, True: 0.004}
    _, checkpoint = trained(
        runs, tmp_path, "lora", f"training.steps={steps}", f"training.warmup_ratio={warmup / steps}",
        f"training.learning_rate={rates[False]}", f"training.projector_learning_rate={rates[True]}",
        f"training.weight_decay={decay}", f"training.max_grad_norm={longest}", f"training.max_length={cut}",
    )  # fmt: skip
    config = read_checkpoint(checkpoint).config
    torch.manual_seed(config.seed)
    model = attach_adapter(tiny_base.model, method_class("lora")(config).adapter(tiny_base))
    llava, folder = adapted_base(model), runs.benchmark.parent / MIXED
    whole, dataset = (
        train_dataset(tiny_base, load_train(folder / "train.json", folder / "images"), folder / "images", length)
        for length in (2048, cut)
    )
    assert 0 < sum(len(whole[row].input_ids) > cut for row in range(len(whole))) < len(whole)
    plan, theta = BatchPlan(config.seed, len(dataset), 8), {n: p.detach().double() for n, p in trainable(model).items()}
    first, second = ({name: torch.zeros_like(value) for name, value in theta.items()} for _ in range(2))
    logged = events(checkpoint.parent, "step")
    assert len(logged) == steps
    for step, event in enumerate(logged):
        factor = min(step / warmup, (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)
        batch = collate_train([dataset[row] for row in plan.batch(step)], tiny_base.tokenizer.pad_token_id)
        llava(**batch).loss.backward()
        gradients = {name: p.grad.double() for name, p in trainable(model).items()}  # type: ignore[union-attr]
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        assert norm > 2 * longest, "it is clipped"
        assert event["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert event["learning_rate"] == pytest.approx(rates[False] * factor, rel=1e-6)
        for name, parameter in trainable(model).items():
            gradient, rate = gradients[name] * longest / norm, rates[PROJECTOR in name] * factor
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            theta[name] = (1 - rate * decay) * theta[name] - rate * mean / (square.sqrt() + 1e-8)
            parameter.data.copy_(theta[name])
        model.zero_grad()
    saved, expected = tensors(checkpoint), adapter_tensors(model)
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_accumulation_equals_the_whole_batch(method: str, runs: Runs, tmp_path: Path) -> None:
    """Micro-batches of one give the same losses; some hold no image, none has padding, and answer lengths differ."""
    settings = ("training.steps=20", "training.learning_rate=5e-3", "training.projector_learning_rate=5e-4")
    whole, _ = trained(runs, tmp_path / "whole", method, *settings)
    cut, _ = trained(runs, tmp_path / "cut", method, *settings, "training.micro_batch_size=1")
    assert len(whole) == 20
    assert whole[-1] < 0.9 * whole[0], "it learns"
    for a, b in zip(whole, cut, strict=True):
        assert abs(a - b) <= 1e-5 * abs(a)


def model_of(method: str, base: LoadedBase) -> TrainedModel:
    config = tiny_config(method, Path("nowhere"), "adapter.train_projector=true")
    kind = method_class(method)(config)
    model = attach_adapter(base.model, kind.adapter(base))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith((".B", "lora_B.default.weight")):
            parameter.data.normal_(std=0.1, generator=generator)
    return TrainedModel(model, kind, 8)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_transformers_own(method: str, tiny_base: LoadedBase, mini_yaml: Path) -> None:
    """Our loss takes logits at answer positions only, and equals LlavaForConditionalGeneration's, which uses all."""
    folder = mini_yaml.parent / MIXED
    dataset = train_dataset(tiny_base, load_train(folder / "train.json", folder / "images"), folder / "images", 2048)
    model = model_of(method, tiny_base)
    for batch in train_batches(tiny_base, dataset, 8):
        answers = (batch["labels"] != -100).sum()
        loss = model(**batch, num_items_in_batch=answers)["loss"]
        model.zero_grad()
        loss.backward()
        ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        with routing(NEWEST_ROUTER):
            oracle = adapted_base(model.model)(**batch).loss
        oracle.backward()
        torch.testing.assert_close(loss, oracle, rtol=1e-6, atol=0)
        assert len(ours) > 10
        for name, parameter in model.named_parameters():
            if name in ours:
                torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_text_alone(method: str, tiny_base: LoadedBase) -> None:
    model = model_of(method, tiny_base)
    enable_checkpointing(model.model)
    batch = train_batch(tiny_base, [("How many things are there?", "two"), ("Are you sure?", "yes")])
    assert "pixel_values" not in batch
    answers = (batch["labels"] != -100).sum()
    loss = model.train()(**batch, num_items_in_batch=answers)["loss"]
    loss.backward()
    with routing(NEWEST_ROUTER):
        oracle = adapted_base(model.model.eval())(**batch).loss
    torch.testing.assert_close(loss, oracle, rtol=1e-6, atol=0)
    adapter, projector = (
        [p.grad for name, p in model.named_parameters() if p.requires_grad and (PROJECTOR in name) == inside]
        for inside in (False, True)
    )
    assert len(projector) == 4
    assert all(grad is not None and not grad.any() for grad in projector), "zero, but there: processes wait for it"
    assert all(grad is not None for grad in adapter)
    assert sum(bool(grad.any()) for grad in adapter) > len(adapter) // 2  # type: ignore[union-attr]
