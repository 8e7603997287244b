"""Answers from Python, with reasons: the text of the batch answerer, scores and weights as computed apart from it."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clmoe
from clmoe.bases.inputs import prompt_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.answer import Explanation, LoadedCheckpoint
from clmoe.experts.forward import adapted_base, base_features
from clmoe.experts.layer import expert_layers
from clmoe.experts.routing import RouteSelection, routing
from clmoe.locators import make_locator
from clmoe.locators.base import Asked
from clmoe.utils.files import read_json
from tests.evaluate.opened import checkpoints, opened
from tests.runs import Runs
from tests.support import TASKS, prompt_batches

QUESTION = "How many things are there?"


def loaded_of(runs: Runs, base: LoadedBase, method: str) -> LoadedCheckpoint:
    """A checkpoint of two tasks."""
    return LoadedCheckpoint(opened(runs, base, method), list(TASKS[:2]))


@pytest.fixture
def image(mini_yaml: Path) -> Path:
    return mini_yaml.parent / "count" / "images" / "4.png"


def inputs(loaded: LoadedCheckpoint, image: Path) -> dict[str, torch.Tensor]:
    base = loaded.answerer.base
    dataset = prompt_dataset(base, [Question("x", image.name, QUESTION, "", {})], image.parent)
    return prompt_batches(base, dataset, 1)[0]


@pytest.mark.parametrize("method", ["lora", "moelora", "clmoe", "llava_cmoe"])
def test_the_watched_text_ends_as_the_batch_answer(method: str, runs: Runs, tiny_base: LoadedBase, image: Path) -> None:
    loaded = loaded_of(runs, tiny_base, method)
    seen: list[Explanation] = []
    final = loaded.explain(image, QUESTION, 6, watch=seen.append)
    assert final.text == loaded.answer(image, QUESTION, 6)
    assert len(seen) == 6, "the reasons come before the first of six tokens, the text so far before each other one"
    assert seen[0].text == ""
    texts = [partial.text for partial in seen] + [final.text]
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(texts))
    assert len(set(texts)) > 3
    assert all((e.task, e.scores, e.routers) == (final.task, final.scores, final.routers) for e in seen)
    if method == "lora":
        assert (final.task, final.scores, final.routers) == (None, {}, [])


@pytest.mark.parametrize("method", ["moelora", "clmoe", "llava_cmoe"])
def test_the_weights_are_those_the_experts_are_mixed_with(
    method: str, runs: Runs, tiny_base: LoadedBase, image: Path
) -> None:
    """Oracle: what the router banks hand to the experts in a forward pass of our own."""
    loaded = loaded_of(runs, tiny_base, method)
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
        adapted_base(model)(**inputs(loaded, image))
    assert len(given) == len(explained.routers) == (2 if method == "llava_cmoe" else 6)
    for router, (name, weights) in zip(explained.routers, given.items(), strict=True):
        assert f"layers.{router.block}.mlp" in name
        assert name.endswith(router.linear or "mlp")
        assert router.weights == pytest.approx(weights[0].mean(0).tolist(), abs=1e-6)
        assert sum(router.weights) == pytest.approx(1, abs=1e-5)
    owners = [router.owners for router in explained.routers]
    if method == "llava_cmoe":
        plan = read_json(checkpoints(runs, method)[1] / "expansion.json")
        assert owners == [[0] * 4 + [1] * block["added"] for block in plan[-1]["blocks"].values()]
        older = loaded.explain(image, QUESTION, 1, locator="oracle", task=TASKS[0])
        assert all(len(router.weights) == 4 for router in older.routers), "the older router reaches the older experts"
    else:
        assert owners == [[0] * 4] * 6


@pytest.mark.parametrize("method", ["clmoe", "llava_cmoe"])
def test_scores_are_the_sealed_locators(method: str, runs: Runs, tiny_base: LoadedBase, image: Path) -> None:
    loaded = loaded_of(runs, tiny_base, method)
    explained = loaded.explain(image, QUESTION, 1)
    feature = base_features(loaded.answerer.model, inputs(loaded, image))
    locator = make_locator(loaded.answerer.method.config.locator, 0)
    locator.load(checkpoints(runs, method)[1] / "locator.safetensors")
    scores = locator.scores(Asked(["x"], 2, feature))[0].tolist()
    assert explained.scores == pytest.approx(dict(zip(TASKS, scores, strict=False)), rel=1e-5)
    assert explained.task == TASKS[int(np.argmax(scores))]


def test_locators_choose_the_task(runs: Runs, tiny_base: LoadedBase, image: Path) -> None:
    loaded = loaded_of(runs, tiny_base, "clmoe")
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
    loaded = loaded_of(runs, tiny_base, "clmoe")
    with pytest.raises(ClmoeError, match=named):
        loaded.explain(image, QUESTION, locator=locator, task=task)


def test_an_image_may_be_a_path_or_a_pil_image_or_missing(
    runs: Runs, tiny_base: LoadedBase, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pixels give the same answer, however they come."""
    loaded = loaded_of(runs, tiny_base, "clmoe")
    seen: list[torch.Tensor | None] = []
    real = loaded.answerer.generate
    monkeypatch.setattr(
        loaded.answerer, "generate", lambda items, *rest: seen.append(items[0].pixel_values) or real(items, *rest)
    )
    picture = Image.open(image)
    for kind in (image, str(image), picture, picture.convert("RGBA")):
        loaded.answer(kind, QUESTION, 1)
    assert all(torch.equal(pixels, seen[0]) for pixels in seen)
    assert loaded.answer(picture.convert("CMYK"), QUESTION, 6), "a PIL image of any mode that a file may have"
    seen.clear()
    assert loaded.answer(None, QUESTION, 6)
    assert seen == [None]
    for wrong in (3, b"png", np.zeros((3, 3, 3))):
        with pytest.raises(ClmoeError, match="path, a PIL image or None"):
            loaded.answer(wrong, QUESTION)


def test_load_opens_a_checkpoint_folder(runs: Runs, image: Path) -> None:
    loaded = clmoe.load(runs.chain("clmoe")[1])
    assert (loaded.learned, loaded.keeps_parts) == (list(TASKS[:2]), True)
    assert loaded.answer(image, QUESTION, 6)
    with pytest.raises(ClmoeError, match="not a finished checkpoint"):
        clmoe.load(image.parent)
