"""ModalPrompt: its tokens against new words of the vocabulary, its sums against float64 loops, and what is frozen."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clmoe.bases.llava import SOFT, LoadedBase
from clmoe.config import load_config
from clmoe.convert.merge import check_mergeable
from clmoe.data.batches import collate_prompts, first_questions
from clmoe.data.records import MASKED, Question, TrainRecord
from clmoe.errors import ClmoeError
from clmoe.evaluate.relocate import usable_locators
from clmoe.experts.forward import FeatureStore, adapted_base
from clmoe.experts.model import attach_adapter, load_adapter
from clmoe.experts.prompts import SoftPrompts, soft_prompts
from clmoe.experts.routing import RouteSelection, RouteTrace, routing
from clmoe.locators import make_locator
from clmoe.locators.base import Asked
from clmoe.methods import method_class
from clmoe.methods.modalprompt import ModalPrompt, ranked
from clmoe.train.checkpoint import checked_method, read_checkpoint
from tests.methods.helpers import NewBase, answers_alone_and_together, begun, task_records
from tests.runs import Runs, tensors
from tests.support import TASKS, copy_base, pixels

L, PICKS = 3, 2
SETTINGS = ("adapter.train_projector=false", f"options.length={L}", f"options.picks={PICKS}")
QUESTIONS = ["What is it?", "Which colour is it, and how many of them are there?"]


@pytest.fixture
def checkpoints(runs: Runs) -> list[Path]:
    """Three tasks, two of which share a prompt."""
    return runs.chain("modalprompt", *SETTINGS, tasks=TASKS)


def cosine(a: Tensor, b: Tensor) -> float:
    lengths = math.sqrt(sum(float(x) ** 2 for x in a)) * math.sqrt(sum(float(x) ** 2 for x in b))
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def test_soft_tokens_are_new_words_after_the_first_token(checkpoints: list[Path], tiny_base: LoadedBase) -> None:
    """Oracle: a copy of the base whose vocabulary has every task's tokens as further words, as in the released code."""
    model = load_adapter(copy_base(tiny_base).model, checkpoints[-1], trainable=False).eval()
    tokens = soft_prompts(model).bank.tokens()
    assert tokens.shape[:2] == (3, L)
    larger = copy_base(tiny_base).model
    words = larger.get_input_embeddings().num_embeddings
    larger.resize_token_embeddings(words + 3 * L, mean_resizing=False)
    larger.get_input_embeddings().weight.data[words:] = tokens.flatten(0, 1)
    asked = [Question(text, "x.png", text, "", {}) for text in QUESTIONS]
    weights = torch.tensor([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0]])  # the larger comes last
    order = [[0, 2], [1, 0]]
    prompted = replace(tiny_base, soft_tokens=PICKS * L)
    items = [prompted.prompt_item(question, picture) for question, picture in zip(asked, pixels(2), strict=True)]
    plain = [tiny_base.prompt_item(question, None).input_ids.tolist() for question in asked]
    batch = collate_prompts(items, tiny_base.tokenizer.pad_token_id)
    by_hand = []
    for item, ids, tasks in zip(items, plain, order, strict=True):
        spelled = [words + task * L + place for task in tasks for place in range(L)]
        by_hand.append(replace(item, input_ids=torch.tensor([ids[0], *spelled, *ids[1:]])))
    theirs = collate_prompts(by_hand, tiny_base.tokenizer.pad_token_id)
    assert not batch["attention_mask"].all(), "one prompt is padded"
    with torch.no_grad():
        with routing(RouteSelection(weights=weights)):
            found = adapted_base(model)(**batch).logits
        expected = larger(**theirs).logits[..., :words]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("picks", [1, 2, 3])
def test_ranks_are_those_of_sorting_and_the_older_wins_a_tie(picks: int) -> None:
    likeness = torch.tensor([[0.1, 0.7, 0.7, -0.2], [0.3, -math.inf, 0.2, 0.9]])
    found = ranked(likeness, picks)
    for row, values in enumerate(likeness.tolist()):
        best = sorted(range(4), key=lambda task: (-values[task], task))
        expected = [max(0.0, 1 - best.index(task) / picks) for task in range(4)]
        assert found[row].tolist() == pytest.approx(expected)


def test_training_picks_older_tasks_by_image_and_question_and_pulls_the_prototype(
    checkpoints: list[Path], runs: Runs, new_base: NewBase
) -> None:
    """Prototypes, similarities, picks and the loss, computed number by number in float64; a masked record counts 0."""
    base = new_base()
    images, root = task_records(runs.benchmark, TASKS[1], 6)[0], runs.benchmark.parent / TASKS[1] / "images"
    records = [*images, TrainRecord("masked", None, MASKED)]
    method, model = begun("modalprompt", base, runs, checkpoints[1], *SETTINGS, records=records)
    assert isinstance(method, ModalPrompt)
    bank = soft_prompts(model).bank
    assert bank.prompt.requires_grad and bank.anchors is not None and not bank.anchors.requires_grad
    W1, b1, W2, b2 = (parameter.detach().double() for parameter in bank.transform.parameters())
    tokens = bank.prompt.detach().double()
    hidden = [W1 @ token + b1 for token in tokens]
    z = sum(W2 @ (h / (1 + torch.exp(-h))) + b2 for h in hidden) / len(tokens)
    torch.testing.assert_close(bank.prototypes()[-1].double(), z, rtol=1e-5, atol=1e-6)

    config = load_config("modalprompt", {}, list(SETTINGS), str(runs.model))
    store = FeatureStore.of(base, config, None, "image_text")
    features = store.features(model, first_questions(images), root).double()
    image, text = features.chunk(2, 1)
    rows = torch.tensor([6, 3, 0, 5])
    selection = method.training_selection(model, rows)
    assert selection.weights is not None
    for place, row in enumerate(rows.tolist()):
        likeness = [0.0, 0.0]
        if row < 6:
            likeness = [cosine(image[row], a.double()) + cosine(text[row], a.double()) for a in bank.anchors]
        best = max(range(2), key=lambda task: (likeness[task], -task))
        expected = [0.5 if task == best else 0.0 for task in range(2)] + [1.0]
        assert selection.weights[place].tolist() == expected
    loss = method.extra_loss(model, RouteTrace(), {"rows": rows})
    wanted = [2.0 if row == 6 else 2 - cosine(image[row], z) - cosine(text[row], z) for row in rows.tolist()]
    assert loss is not None and float(loss.detach()) == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


def test_a_text_tower_that_is_wider_than_the_base_is_refused(
    checkpoints: list[Path], runs: Runs, new_base: NewBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureStore, "features", lambda *unused: torch.zeros(4, 2 * 1000))
    records = task_records(runs.benchmark, TASKS[1], 4)[0]
    with pytest.raises(ClmoeError, match=r"text_encoder: its features are 1000 wide, .*: leave it out"):
        begun("modalprompt", new_base(), runs, checkpoints[0], *SETTINGS, records=records)


def test_a_finished_task_is_frozen_and_its_prototype_kept(checkpoints: list[Path], new_base: NewBase) -> None:
    first, second, third = map(tensors, checkpoints)
    prefix = next(name for name in first if name.endswith(".prompt")).removesuffix("prompt")
    for before, after, tasks in ((first, second, 1), (second, third, 2)):
        frozen, anchors = after[f"{prefix}frozen"], after[f"{prefix}anchors"]
        assert len(frozen) == len(anchors) == tasks
        assert torch.equal(frozen[-1], before[f"{prefix}prompt"])
        assert not torch.equal(after[f"{prefix}prompt"], before[f"{prefix}prompt"])
        assert not torch.equal(after[f"{prefix}transform.0.weight"], before[f"{prefix}transform.0.weight"])
    assert torch.equal(third[f"{prefix}frozen"][0], second[f"{prefix}frozen"][0])
    model = load_adapter(new_base().model, checkpoints[1], trainable=False)
    torch.testing.assert_close(soft_prompts(model).bank.prototypes().detach(), third[f"{prefix}anchors"])


def test_soft_tokens_start_as_words_of_the_base(new_base: NewBase, runs: Runs) -> None:
    base = new_base()
    words = base.model.get_input_embeddings().weight
    method = checked_method(load_config("modalprompt", {}, list(SETTINGS), str(runs.model)))
    prompt = soft_prompts(attach_adapter(base.model, method.adapter(base))).bank.prompt.detach()
    assert len(prompt) == L and (prompt.unsqueeze(1) == words).all(-1).any(1).all()


def test_tasks_with_equal_scores_are_ranked_by_their_nearness_to_the_best(
    checkpoints: list[Path], new_base: NewBase
) -> None:
    """The oracle only names a task; the shares of ``knn`` may do so for some questions of a batch."""
    model = load_adapter(new_base().model, checkpoints[-1], trainable=False)
    method = method_class("modalprompt")(read_checkpoint(checkpoints[-1]).config)
    assert isinstance(method, ModalPrompt)
    z = method.prototypes(model).detach()
    scores = torch.cat([torch.eye(3), torch.tensor([[0.2, 0.1, 0.7]])]).double()
    weights = method.mixture(model, scores)
    assert weights[3].tolist() == [0.5, 0.0, 1.0]
    for task in range(3):
        assert torch.equal(method.mixture(model, scores[task : task + 1])[0], weights[task]), "as in a batch of one"
        others = [other for other in range(3) if other != task]
        nearest = max(others, key=lambda other: cosine(z[task], z[other]))
        assert weights[task].tolist() == [1.0 if t == task else 0.5 if t == nearest else 0.0 for t in range(3)]


def test_the_locator_compares_both_features_with_the_prototypes() -> None:
    generator = torch.Generator().manual_seed(0)
    features, z = torch.randn(4, 10, generator=generator), torch.randn(3, 5, generator=generator)
    locator = make_locator(load_config("modalprompt", {}, []).locator, 0)
    found = locator.scores(Asked([*"abcd"], 3, features, prototypes=z))
    expected = [[(cosine(f[:5], p) + cosine(f[5:], p)) / 2 for p in z] for f in features]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert locator.size() == (0, 0) and not locator.fits


def test_only_methods_that_learn_prototypes_can_be_located_by_them() -> None:
    with pytest.raises(ClmoeError, match="disco learns no prototypes"):
        checked_method(load_config("disco", {}, ["locator=learned_prototype"]))
    assert "learned_prototype" in usable_locators("modalprompt")
    assert "learned_prototype" not in usable_locators("separate")


def test_a_method_file_without_a_locator_is_told_to_name_one() -> None:
    file = Path(method_class.__code__.co_filename).with_name("modalprompt.py")
    with pytest.raises(ClmoeError, match=r"needs a locator: set locator=NAME \(gaussian, .*learned_prototype"):
        checked_method(load_config(str(file), {}, ["adapter.train_projector=false"]))


def test_soft_prompts_cannot_be_merged_into_the_base(checkpoints: list[Path]) -> None:
    with pytest.raises(ClmoeError, match="soft prompts are inputs and not weights"):
        check_mergeable(read_checkpoint(checkpoints[0]))


def test_without_places_or_with_the_adapter_off_nothing_is_replaced(checkpoints: list[Path], new_base: NewBase) -> None:
    base = new_base()
    embedding = base.model.get_input_embeddings()
    ids = torch.tensor([[1, 5, 6]])
    model = load_adapter(base.model, checkpoints[0], trainable=False)
    patched = base.model.get_input_embeddings()
    assert isinstance(patched, SoftPrompts)
    assert torch.equal(patched(ids), embedding(ids))
    with model.disable_adapter(), pytest.raises(IndexError):
        patched(torch.tensor([[1, SOFT]]))


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch(checkpoints: list[Path], runs: Runs, tmp_path: Path) -> None:
    alone, together = answers_alone_and_together(checkpoints[-1], runs, tmp_path)
    assert alone == together
