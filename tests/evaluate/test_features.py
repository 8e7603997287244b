"""The locators' features of prompts, shared prefixes or not: those of whole prompts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clmoe.bases.inputs import SharedPrompts, prompt_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.evaluate.generate import open_answerer
from clmoe.experts.forward import last_prompt_features
from clmoe.locators import base as features
from clmoe.locators.base import FeatureStore
from clmoe.train.checkpoint import read_checkpoint
from tests.evaluate.test_generate import Asked, shared
from tests.runs import Runs
from tests.support import prompt_batches

__all__ = ["shared"]


@pytest.mark.parametrize("kind", ["last", "pooled"])
def test_features_are_those_of_whole_prompts(
    kind: Any, runs: Runs, new_base: Callable[[], LoadedBase], shared: Asked
) -> None:
    base, bare = new_base(), new_base()
    done = read_checkpoint(runs.chain("clmoe")[1])
    model: Any = open_answerer(done.config, done, base).model
    found = FeatureStore(base, kind, 7, None, True).features(model, *shared)
    whole = prompt_batches(bare, prompt_dataset(bare, *shared), 1)
    expected: Tensor = torch.cat([last_prompt_features(bare.model, batch, kind) for batch in whole])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_features_share_images_and_their_files_say_so(
    tiny_base: LoadedBase, shared: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []

    def counted(model: Any, batch: Any, kind: Any) -> Tensor:
        groups.append(len(batch.first) if isinstance(batch, SharedPrompts) else 0)
        return torch.zeros(len(batch.group) if isinstance(batch, SharedPrompts) else len(batch["input_ids"]), 2)

    monkeypatch.setattr(features, "base_features", counted)
    stores = [FeatureStore(tiny_base, "last", 64, None, share) for share in (True, False)]
    for store in stores:
        assert len(store.features(None, *shared)) == 24  # type: ignore[arg-type]
    assert groups == [6, 0], "five images and what has none"
    assert stores[0]._key(*shared) != stores[1]._key(*shared)
