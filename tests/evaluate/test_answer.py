"""Answers from Python, with reasons: the text of the batch answerer, scores and weights as computed apart from it."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import clmoe
from clmoe.bases.inputs import prompt_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.answer import Explanation, LoadedCheckpoint
from clmoe.evaluate.generate import open_answerer
from clmoe.experts.forward import base_features
from clmoe.experts.model import adapted_base, expert_layers
from clmoe.experts.routing import RouteSelection, routing
from clmoe.locators import make_locator
from clmoe.locators.base import Asked
from clmoe.train.checkpoint import read_checkpoint
from clmoe.utils.files import read_json
from tests.runs import Runs
from tests.support import TASKS, prompt_batches

SETTINGS = {"llava_cmoe": ("adapter.train_projector=false", "options.probe_min_steps=2", "locator.options.steps=20")}
QUESTION = "How many things are there?"


def opened(runs: Runs, base: LoadedBase, method: str) -> LoadedCheckpoint:
    """A checkpoint of two tasks."""
    done = read_checkpoint(runs.chain(method, *SETTINGS.get(method, ()))[1])
    return LoadedCheckpoint(open_answerer(done.config, done, base), done.lineage.tasks)


def folder_of(runs: Runs, method: str) -> Path:
    return runs.chain(method, *SETTINGS.get(method, ()))[1]


@pytest.fixture
def image(mini_yaml: Path) -> Path:
    return mini_yaml.parent / "count" / "images" / "4.png"


def inputs(loaded: LoadedCheckpoint, image: Path) -> dict[str, torch.Tensor]:
    base = loaded.answerer.base
    dataset = prompt_dataset(base, [Question("x", image.name, QUESTION, "", {})], image.parent)
    return prompt_batches(base, dataset, 1)[0]


@pytest.mark.parametrize("method", ["lora", "moelora", "clmoe", "llava_cmoe"])
def test_the_watched_text_ends_as_the_batch_answer(method: str, runs: Runs, tiny_base: LoadedBase, image: Path) -> None:
    loaded = opened(runs, tiny_base, method)
    seen: list[Explanation] = []
    final = loaded.explain(image, QUESTION, 6, watch=seen.append)
    assert final.text == loaded.answer(image, QUESTION, 6)
    assert len(seen) == 6, "the reasons come before the first of six tokens, the text so far before each other one"
    assert seen[0].text == ""
    texts = [partial.text for partial in seen] + [final.text]
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(texts))
    assert len(set(texts)) > 3
    assert all((e.task, e.scores, e.routers) == (final.task, final.scores, final.routers) for e in seen)


@pytest.mark.parametrize("method", ["moelora", "clmoe", "llava_cmoe"])
def test_the_weights_are_those_the_experts_are_mixed_with(
    method: str, runs: Runs, tiny_base: LoadedBase, image: Path
) -> None:
    """Oracle: what the router banks hand to the experts in a forward pass of our own."""
    loaded = opened(runs, tiny_base, method)
    explained = loaded.explain(image, QUESTION, 1, locator="last")
    model = loaded.answerer.model
    given: dict[str, torch.Tensor] = {}
    for name, layer in expert_layers(model).items():
        layer.routers.register_forward_hook(lambda module, args, out, name=name: given.__setitem__(name, out))
    chosen = {
        "moelora": RouteSelection(),
        "clmoe": RouteSelection(task=torch.tensor([1]), beta=0.5),
        "llava_cmoe": RouteSelection(router=torch.tensor([1])),
    }
    with torch.no_grad(), routing(chosen[method]):
        adapted_base(model)(**inputs(loaded, image))  # type: ignore[arg-type]
    assert len(given) == len(explained.routers) == (2 if method == "llava_cmoe" else 6)
    for router, (name, weights) in zip(explained.routers, given.items(), strict=True):
        assert f"layers.{router.block}.mlp" in name
        assert name.endswith(router.linear or "mlp")
        assert router.weights == pytest.approx(weights[0].mean(0).tolist(), abs=1e-6)
        assert sum(router.weights) == pytest.approx(1, abs=1e-5)
    owners = [router.owners for router in explained.routers]
    if method == "llava_cmoe":
        plan = read_json(folder_of(runs, method) / "plan.json")
        assert owners == [[0] * 4 + [1] * block["added"] for block in plan[-1]["blocks"].values()]
    else:
        assert owners == [[0] * 4] * 6


def test_the_older_router_reaches_the_older_experts_only(runs: Runs, tiny_base: LoadedBase, image: Path) -> None:
    loaded = opened(runs, tiny_base, "llava_cmoe")
    older = loaded.explain(image, QUESTION, 1, locator="oracle", task=TASKS[0])
    assert all(len(router.weights) == 4 for router in older.routers)


def test_centre_distances_are_the_scores(runs: Runs, tiny_base: LoadedBase, image: Path) -> None:
    """Oracle: numpy on the stored moments and the base's own hidden state, adapter off."""
    loaded = opened(runs, tiny_base, "clmoe")
    scores = loaded.explain(image, QUESTION, 1).scores
    model, folder = loaded.answerer.model, folder_of(runs, "clmoe")
    feature = base_features(model, inputs(loaded, image)).double().numpy()[0]  # type: ignore[arg-type]
    stored = {name: tensor.double().numpy() for name, tensor in load_file(folder / "locator.safetensors").items()}
    share = stored["prototype.count"] / stored["prototype.count"].sum()
    centre = share @ stored["prototype.mean"]
    variance = share @ (stored["prototype.variance"] + (stored["prototype.mean"] - centre) ** 2)
    distances = np.linalg.norm((feature - stored["prototype.mean"]) / np.sqrt(variance), axis=1)
    assert scores == pytest.approx(dict(zip(TASKS, -distances, strict=False)), rel=1e-6)


def test_bank_scores_are_the_scores(runs: Runs, tiny_base: LoadedBase, image: Path) -> None:
    loaded = opened(runs, tiny_base, "llava_cmoe")
    explained = loaded.explain(image, QUESTION, 1)
    feature = base_features(loaded.answerer.model, inputs(loaded, image))  # type: ignore[arg-type]
    bank = make_locator(loaded.answerer.method.config.locator, 0)
    bank.load(folder_of(runs, "llava_cmoe") / "locator.safetensors")
    z = bank.scores(Asked(["x"], 2, feature))[0].tolist()
    assert explained.scores == pytest.approx(dict(zip(TASKS, z, strict=False)), rel=1e-5)
    assert explained.task == TASKS[int(np.argmax(z))]


def test_locators_choose_the_task(runs: Runs, tiny_base: LoadedBase, image: Path) -> None:
    loaded = opened(runs, tiny_base, "clmoe")
    by_task = {task: loaded.explain(image, QUESTION, 1, locator="oracle", task=task) for task in TASKS[:2]}
    assert [explained.task for explained in by_task.values()] == list(TASKS[:2])
    assert by_task[TASKS[0]].scores == by_task[TASKS[1]].scores
    assert by_task[TASKS[0]].routers != by_task[TASKS[1]].routers
    assert loaded.explain(image, QUESTION, 1, locator="last").task == TASKS[1]
    drawn = {loaded.explain(image, f"Is it {n}?", 1, locator="random").task for n in range(8)}
    assert drawn == set(TASKS[:2]), "the draw depends on the question"
    for name in ("last", "random"):
        assert loaded.explain(image, QUESTION, 3, locator=name).text == loaded.answer(image, QUESTION, 3, name)


@pytest.mark.parametrize(
    ("locator", "task", "named"),
    [
        ("oracle", "color", "'colour'"),
        ("oracle", None, "oracle"),
        ("", "colour", "oracle"),
        ("vae", None, "clmoe eval"),
    ],
)
def test_the_oracle_needs_a_task_and_the_others_take_none(
    locator: str, task: str | None, named: str, runs: Runs, tiny_base: LoadedBase, image: Path
) -> None:
    loaded = opened(runs, tiny_base, "clmoe")
    for ask in (loaded.answer, loaded.explain):
        with pytest.raises(ClmoeError, match=named):
            ask(image, QUESTION, locator=locator, task=task)


def test_plain_lora_has_neither_scores_nor_experts(runs: Runs, tiny_base: LoadedBase, image: Path) -> None:
    explained = opened(runs, tiny_base, "lora").explain(image, QUESTION, 1)
    assert (explained.task, explained.scores, explained.routers) == (None, {}, [])


def test_an_image_may_be_a_path_or_a_pil_image_or_missing(
    runs: Runs, tiny_base: LoadedBase, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pixels give the same answer, however they come."""
    loaded = opened(runs, tiny_base, "clmoe")
    seen: list[torch.Tensor | None] = []
    real = loaded.answerer.generate
    monkeypatch.setattr(
        loaded.answerer, "generate", lambda items, *rest: seen.append(items[0].pixel_values) or real(items, *rest)
    )
    picture = Image.open(image)
    kinds = [image, str(image), picture, picture.convert("RGBA"), picture.convert("RGB").convert("CMYK")]
    answers = [loaded.answer(kind, QUESTION, 6) for kind in kinds[:4]]
    assert len(set(answers)) == 1
    assert all(torch.equal(pixels, seen[0]) for pixels in seen)  # type: ignore[arg-type]
    assert loaded.explain(picture, QUESTION, 6).text == answers[0]
    assert loaded.answer(kinds[4], QUESTION, 6), "a PIL image of any mode that a file may have"
    seen.clear()
    assert loaded.answer(None, QUESTION, 6)
    assert seen == [None]


@pytest.mark.parametrize("image", [3, b"png", np.zeros((3, 3, 3))])
def test_another_kind_of_image_is_an_error_that_says_what_is_accepted(
    image: Any, runs: Runs, tiny_base: LoadedBase
) -> None:
    with pytest.raises(ClmoeError, match="path, a PIL image or None"):
        opened(runs, tiny_base, "lora").answer(image, QUESTION)


def test_load_opens_a_checkpoint_folder(runs: Runs, image: Path) -> None:
    loaded = clmoe.load(runs.chain("clmoe")[1])
    assert (loaded.learned, loaded.keeps_parts) == (list(TASKS[:2]), True)
    assert loaded.answer(image, QUESTION, 6)
    with pytest.raises(ClmoeError, match="not a finished checkpoint"):
        clmoe.load(image.parent)
