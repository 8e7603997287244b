"""Methods with a LoRA per task: how they fuse or choose the LoRAs, against loops over the tasks' own factors."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from clmoe.bases.inputs import answer_letters, prompt_dataset
from clmoe.bases.llava import LoadedBase, open_encoder
from clmoe.config import ModelConfig
from clmoe.data.records import load_questions
from clmoe.errors import ClmoeError
from clmoe.evaluate.answer import open_answerer
from clmoe.experts.forward import adapted_base
from clmoe.experts.layer import ExpertLayer, expert_layers, experts_by_linear
from clmoe.experts.model import load_adapter
from clmoe.experts.routing import LETTER_ROUTER, RouteSelection, routing
from clmoe.methods import method_class
from clmoe.methods.base import TaskContext
from clmoe.methods.mrlora import MrLora
from clmoe.train.checkpoint import read_checkpoint
from clmoe.utils.tensors import same_bits
from tests.methods.helpers import same_adapter
from tests.methods.test_contract import ROWS
from tests.runs import Runs, events, texts
from tests.support import TASKS, copy_base, prompt_batch, prompt_batches, tiny_config

pytestmark = pytest.mark.slow
SCORES = torch.tensor([[0.9, 0.85, -0.3], [0.1, 0.2, 0.3]], dtype=torch.float64)
LAST = "1"  # the last of the tiny model's two blocks
SCALE = 2.0


def last(runs: Runs, method: str, *overrides: str) -> Path:
    """The checkpoint after three tasks, with a LoRA of rank 8 and scale 2 for each task."""
    return runs.chain(method, *ROWS[method].overrides, *overrides, tasks=TASKS)[-1]


def factors(base: LoadedBase, checkpoint: Path) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The pairs ``A_i``, ``B_i`` of every linear, in float64, oldest task first."""
    model = load_adapter(copy_base(base).model, checkpoint, trainable=False)
    found = {}
    for name, experts in experts_by_linear(model).items():
        A, B = (factor.double() for factor in experts.packed())
        found[name] = list(zip(A.chunk(experts.count), B.chunk(experts.count, 1), strict=True))
    return found


def in_and_out(model: PeftModel, batch: dict[str, Tensor], selection: RouteSelection) -> dict[str, Any]:
    """The input and output of every patched linear in one forward pass."""
    seen: dict[str, Any] = {}

    def watch(layer: ExpertLayer) -> None:
        layer.register_forward_hook(lambda module, args, out: seen.__setitem__(layer.name, (args[0], out)))

    for layer in expert_layers(model).values():
        watch(layer)
    with torch.no_grad(), routing(selection):
        adapted_base(model).model(**batch)
    return seen


@pytest.mark.parametrize(
    ("name", "temperature", "variant"), [("disco", 0.05, ""), ("hide", 0.1, "published"), ("hide", 0.1, "released")]
)
def test_the_tasks_loras_are_fused_as_the_paper_or_its_code_says(
    name: str, temperature: float, variant: str, runs: Runs, tiny_base: LoadedBase
) -> None:
    """Oracle: a float64 loop over factors that a run of the paper's variant keeps apart. Only the gate is float32."""
    own = factors(tiny_base, last(runs, name))
    checkpoint = last(runs, name, *(["options.variant=released"] if variant == "released" else []))
    base = copy_base(tiny_base)
    model = load_adapter(base.model.double(), checkpoint, trainable=False).eval()
    method = method_class(name)(read_checkpoint(checkpoint).config)
    batch = prompt_batch(tiny_base, ["What is it?", "Which colour is it?"])
    batch["pixel_values"] = batch["pixel_values"].double()
    shares = method.mixture(model, SCORES)
    assert shares is not None
    exp = [[math.exp(score / temperature) for score in row] for row in SCORES.tolist()]
    expected = torch.tensor([[value / sum(row) for value in row] for row in exp], dtype=torch.float64)
    torch.testing.assert_close(shares, expected, rtol=1e-12, atol=0)
    seen = in_and_out(model, batch, RouteSelection(weights=shares.float()))
    assert len(seen) == 2 * 7
    for layer, (x, out) in seen.items():
        linear = expert_layers(model)[layer].base_layer
        assert isinstance(linear, nn.Linear)
        y = x @ linear.weight.t()
        mixes = name == "disco" or f"layers.{LAST}." in layer
        for i, (A_i, B_i) in enumerate(own[layer]):
            if mixes:
                y += SCALE * expected[:, i, None, None] * (x @ A_i.t() @ B_i.t())
            elif variant == "published":
                y += SCALE * (x @ A_i.t() @ B_i.t())
            else:
                for A_j, _ in own[layer]:
                    y += SCALE * (x @ A_j.t() @ B_i.t())
        torch.testing.assert_close(out, y, rtol=1e-6, atol=1e-7, msg=layer)
        assert (out - x @ linear.weight.t()).abs().max() > 1e-3, "the LoRAs have an effect"


def test_a_sample_has_its_own_shares_in_a_batch_of_any_size(runs: Runs, tmp_path: Path) -> None:
    """Answers do not depend on the batch size; the released code uses one similarity for a whole batch."""
    checkpoint, soft = last(runs, "disco"), "options.temperature=2"
    found = [
        texts(runs.evaluate(checkpoint, tmp_path / size, soft, f"evaluation.batch_size={size}"), TASKS[-1], *TASKS)
        for size in ("1", "64")
    ]
    assert found[0] == found[1]
    hard = runs.evaluate(checkpoint, tmp_path / "hard", locator="oracle")
    assert texts(hard, TASKS[-1], *(f"{task}.oracle" for task in TASKS)) != found[0]


@pytest.mark.parametrize("variant", [(), ("options.variant=released",)], ids=["published", "released"])
def test_the_loras_of_mrlora_are_those_that_separate_trains(
    variant: tuple[str, ...], runs: Runs, tiny_base: LoadedBase
) -> None:
    """Training the router before or after a LoRA leaves no trace in it; each further task gets a new router."""
    same = ("adapter.targets=[gate_proj,up_proj,down_proj]", *variant)
    mine, theirs = last(runs, "mrlora", *same), last(runs, "separate")
    separate = factors(tiny_base, theirs)
    for name, pairs in factors(tiny_base, mine).items():
        assert len(pairs) == 2 + 3, "a router of rank 16, and three tasks"
        for (A, B), (A_i, B_i) in zip(pairs[2:], separate[name], strict=True):
            assert same_bits(A, A_i) and same_bits(B, B_i), name
    before = factors(tiny_base, runs.chain("mrlora", *ROWS["mrlora"].overrides, *same, tasks=TASKS)[1])
    assert all(not torch.equal(before[name][0][0], pairs[0][0]) for name, pairs in factors(tiny_base, mine).items())


@pytest.mark.parametrize("variant", ["published", "released"])
def test_letters_are_the_logits_of_the_base_with_the_router_merged_in(
    variant: str, runs: Runs, tiny_base: LoadedBase, mini_yaml: Path
) -> None:
    """Oracle: a plain model with ``W0 + s B_r A_r`` (released: plus the mean of ``s B_i A_i``), prompt by prompt."""
    done = read_checkpoint(last(runs, "mrlora", *([] if variant == "published" else ["options.variant=released"])))
    merged = copy_base(tiny_base)
    for name, pairs in factors(tiny_base, done.folder).items():
        weight = merged.model.get_submodule(name).weight
        weight.data += SCALE * sum(B @ A for A, B in pairs[:2]).float()
        if variant == "released":
            weight.data += SCALE * sum(B @ A for A, B in pairs[2:]).float() / 3
    answerer = open_answerer(done.config, done, copy_base(tiny_base))
    folder = mini_yaml.parent / TASKS[1]
    questions = load_questions(folder / "test.json", folder / "images")
    said = answerer.letters(questions, folder / "images")
    tokens = [merged.tokenizer(f" {letter}", add_special_tokens=False).input_ids for letter in "ABC"]
    experts = dict(zip("ABC", TASKS, strict=True))
    asked = [replace(question, text=answerer.method.referral(question.text, experts)) for question in questions]
    with torch.no_grad():
        batches = prompt_batches(merged, prompt_dataset(merged, asked, folder / "images"), 1)
        expected = torch.cat([merged.model(**batch).logits[:, -1] for batch in batches])[:, torch.tensor(tokens)[:, 0]]
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)
    assert said.std(0).min() > 0
    chosen = answerer.task_scores(questions, folder / "images")
    assert chosen is not None and torch.equal(chosen.argmax(1), said.argmax(1))


def test_as_released_the_router_trains_last_and_beside_the_mean_of_all_loras(
    runs: Runs, tiny_base: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router starts at zero, next to the mean of the LoRAs that the finished checkpoint holds."""
    settings, beside = (*ROWS["mrlora"].overrides, "options.variant=released"), dict[str, tuple[Tensor, Tensor]]()
    checkpoints, real = runs.chain("mrlora", *settings, tasks=TASKS), MrLora._begin_beside
    trained = [(event["task"], event["phase"]) for event in events(checkpoints[-1].parent, "trained")]
    later = [(task, phase) for task in TASKS[1:] for phase in ("trained", "router")]
    assert trained == [(TASKS[0], "trained"), *later]

    def spy(self: MrLora, context: TaskContext) -> None:
        real(self, context)
        for name, experts in experts_by_linear(context.model).items():
            A, B = (factor.detach().double() for factor in experts.packed())
            beside[name] = (B @ A, cast(Tensor, experts.B).detach().clone())

    monkeypatch.setattr(MrLora, "_begin_beside", spy)
    again = runs.train(tmp_path / TASKS[2], "mrlora", TASKS[2], *settings, previous=checkpoints[1])
    assert same_adapter(again, checkpoints[2])
    for name, pairs in factors(tiny_base, again).items():
        assert len(pairs) == 2 + 3
        update, router = beside[name]
        torch.testing.assert_close(update, sum(B @ A for A, B in pairs[2:]) / 3, rtol=1e-5, atol=1e-7)
        assert router.shape[1] == 16 and not router.any()


def test_the_router_of_mrlora_learns_from_its_stored_records(runs: Runs) -> None:
    checkpoint = last(runs, "mrlora")
    memory = json.loads((checkpoint / "memory.json").read_text())
    assert [(past["task"], len(past["records"])) for past in memory] == [(task, 4) for task in TASKS]
    trained = [(event["task"], event["phase"], event["steps"]) for event in events(checkpoint.parent, "trained")]
    assert trained == [
        (TASKS[0], "trained", 4), (TASKS[1], "router", 1), (TASKS[1], "trained", 4),
        (TASKS[2], "router", 2), (TASKS[2], "trained", 4),
    ]  # fmt: skip
    owners = {tuple(layer) for layer in read_checkpoint_layout(checkpoint)}
    assert owners == {(LETTER_ROUTER, LETTER_ROUTER, 0, 1, 2)}
    referral = method_class("mrlora")(tiny_config("mrlora", Path("x"), "options.descriptions={b: the second}")).referral
    assert referral("What?", {"A": "a", "B": "b"}).splitlines()[1:4] == ["A. a", "B. the second", "Question: What?"]


def read_checkpoint_layout(checkpoint: Path) -> list[list[int]]:
    """The owners of the experts of each block."""
    return list(json.loads((checkpoint / "adapter_config.json").read_text())["layout"].values())


def test_letters_are_single_tokens_of_the_base_and_not_endless() -> None:
    """A letter of two tokens is left out, because it would share the first one with other letters."""
    encoder = open_encoder(ModelConfig())
    found = answer_letters(encoder, 8)
    assert list(found)[:6] == list("ABCDEF") and "G" not in found, "the embedded base writes G in two tokens"
    assert len(set(found.values())) == 8
    for letter, token in found.items():
        assert encoder.tokenizer.decode([token]).strip() == letter
    with pytest.raises(ClmoeError, match="tokenizer"):
        answer_letters(encoder, 63)
