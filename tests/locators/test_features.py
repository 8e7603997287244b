"""The feature store: the same features as without it, computed once, and never another prompt's."""

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clmoe.bases.inputs import prompt_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.data.batches import first_questions
from clmoe.data.records import Question, TrainRecord, Turn, load_questions
from clmoe.experts.forward import last_prompt_features
from clmoe.experts.model import load_adapter
from clmoe.locators import base as features_module
from clmoe.locators.base import FeatureStore, feature_folder
from tests.runs import Runs, same_bits
from tests.support import TASKS, copy_base, prompt_batches


@pytest.fixture
def asked(mini_yaml: Path, tmp_path: Path) -> tuple[list[Question], Path]:
    """Twelve questions, some without image, and a copy of their images that a test may change."""
    folder = mini_yaml.parent / TASKS[1]
    images = Path(shutil.copytree(folder / "images", tmp_path / "images"))
    return load_questions(folder / "test.json", images), images


@pytest.fixture
def model(runs: Runs, tiny_base: LoadedBase):  # type: ignore[no-untyped-def]
    return load_adapter(tiny_base.model, runs.chain("clmoe")[1], trainable=False)


@pytest.mark.parametrize("kind", ["last", "pooled"])
def test_features_are_the_bare_bases(kind, model, tiny_base, pristine_base, asked, tmp_path) -> None:  # type: ignore[no-untyped-def]
    store = FeatureStore(tiny_base, kind, 5, tmp_path / "store")
    dataset = prompt_dataset(pristine_base, *asked)
    with torch.no_grad():
        batches = prompt_batches(pristine_base, dataset, 5)
        if kind == "last":
            expected = torch.cat([last_prompt_features(pristine_base.model, batch) for batch in batches])
        else:  # one question at a time, so without padding; every layer's output from a hook
            expected = torch.stack(
                [_mean_of_layers(pristine_base, batch) for batch in prompt_batches(pristine_base, dataset, 1)]
            )
    found = store.features(model, *asked)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _mean_of_layers(base: LoadedBase, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Oracle of `pooled`. The last layer's state counts after the final norm, as ``hidden_states[-1]`` is."""
    language = base.model.model.language_model
    outputs: list[torch.Tensor] = []
    watched = [*language.layers[:-1], language.norm]
    hooks = [
        module.register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for module in watched
    ]
    base.model.model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(outputs) == len(language.layers)
    return torch.stack([output.reshape(-1, output.shape[-1])[-1] for output in outputs]).mean(0)


def test_a_second_call_reads_the_file(model, tiny_base, asked, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    store = FeatureStore(tiny_base, "last", 5, tmp_path / "store")
    first = store.features(model, *asked)
    monkeypatch.setattr(features_module, "base_features", None)
    assert same_bits(store.features(model, *asked), first)
    assert len(list((tmp_path / "store").iterdir())) == 1, "no partial file stays"


def test_every_cause_of_other_features_is_another_file(model, tiny_base, asked, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    questions, images = asked
    store = FeatureStore(tiny_base, "last", 5, tmp_path / "store")
    keys = [store._key(questions, images)]
    keys.append(dataclasses.replace(store, kind="pooled")._key(questions, images))
    keys.append(dataclasses.replace(store, batch_size=6)._key(questions, images))
    keys.append(
        dataclasses.replace(store, base=dataclasses.replace(tiny_base, fingerprint="other"))._key(questions, images)
    )
    other = copy.deepcopy(tiny_base.image_processor)
    other.image_mean = [0.5, 0.4, 0.3]
    keys.append(
        dataclasses.replace(store, base=dataclasses.replace(tiny_base, image_processor=other))._key(questions, images)
    )
    with monkeypatch.context() as patch:
        patch.setattr(tiny_base.model, "is_loaded_in_4bit", True, raising=False)
        keys.append(store._key(questions, images))
    half = copy_base(tiny_base).model.bfloat16()
    keys.append(dataclasses.replace(store, base=dataclasses.replace(tiny_base, model=half))._key(questions, images))
    keys.append(dataclasses.replace(store, share_images=True)._key(questions, images))
    keys.append(store._key(questions[::-1], images))
    keys.append(store._key([dataclasses.replace(questions[0], text="What?"), *questions[1:]], images))
    keys.append(store._key([dataclasses.replace(questions[0], image=None), *questions[1:]], images))
    Image.new("RGB", (32, 24)).save(images / str(questions[0].image))
    keys.append(store._key(questions, images))
    assert len(set(keys)) == len(keys)
    renamed = dataclasses.replace(questions[0], question_id="another id", answer="another answer")
    assert store._key([renamed, *questions[1:]], images) == keys[-1], "neither id nor answer is part of a prompt"


def test_the_first_question_of_a_conversation_locates_its_task() -> None:
    turns = (Turn("What is it?", "red"), Turn("Are you sure?", "yes"))
    asked = first_questions([TrainRecord("7", "0.png", turns), TrainRecord("8", None, turns[1:])])
    assert [(q.question_id, q.image, q.text) for q in asked] == [
        ("7", "0.png", "What is it?"),
        ("8", None, turns[1].question),
    ]


def test_the_folder_is_the_runs_unless_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLMOE_FEATURES", raising=False)
    assert feature_folder(tmp_path) == tmp_path / "features"
    monkeypatch.setenv("CLMOE_FEATURES", str(tmp_path / "shared"))
    assert feature_folder(tmp_path) == tmp_path / "shared"


def test_an_evaluation_uses_what_is_stored(runs: Runs, tmp_path: Path) -> None:
    """Features that all look like task 1's first question: then every question is located there."""
    checkpoint = runs.chain("clmoe")[1]
    run = runs.evaluate(checkpoint, tmp_path / "run")
    files = sorted((run / "features").iterdir())
    assert len(files) == 2, "one per task"
    from safetensors.torch import load_file

    first = load_file(files[0])["features"][:1]
    for file in files:
        save_file({"features": first.expand(12, -1).contiguous()}, file)
    shutil.rmtree(run / "predictions")
    runs.evaluate(checkpoint, run)
    rows = (run / "locator.csv").read_text().splitlines()[1:]
    assert len(rows) == 2 and len({row.split(",")[3] for row in rows}) == 1, rows
