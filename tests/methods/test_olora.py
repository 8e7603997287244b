"""O-LoRA: its penalty by loops, older LoRAs bit for bit, and an inference that adds all of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from clmoe.bases.llava import LoadedBase
from clmoe.experts.model import load_adapter
from clmoe.methods import method_class
from tests.methods.helpers import same_adapter
from tests.runs import Runs, same_bits, tensors
from tests.support import TASKS, prompt_batch, tiny_config

NewBase = Callable[[], LoadedBase]
RANK = 8


def factors(checkpoint: Path) -> dict[str, dict[str, np.ndarray]]:
    """Linear -> ``frozen_A``, ``A``, ``frozen_B``, ``B`` as float64, those that exist."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors(checkpoint).items():
        if ".clmoe_experts." in name:
            linear, _, factor = name.rpartition(".")
            found.setdefault(linear, {})[factor] = value.double().numpy()
    return found


@pytest.mark.parametrize("norm", ["absolute", "squared"])
def test_the_penalty_of_three_tasks(norm: str, runs: Runs, new_base: NewBase) -> None:
    """Every entry of every product of the newest A with each older one, added up one by one."""
    third = runs.chain("olora", tasks=TASKS)[2]
    method = method_class("olora")(tiny_config("olora", Path("nowhere"), "options.weight=0.3", f"options.norm={norm}"))
    model = load_adapter(new_base().model, third, trainable=True)
    found = method.extra_loss(model, None, {})  # type: ignore[arg-type]
    assert found is not None
    expected = 0.0
    for parts in factors(third).values():
        for old in parts["frozen_A"]:
            for new in parts["A"]:
                overlap = sum(a * b for a, b in zip(old, new, strict=True))
                expected += abs(overlap) if norm == "absolute" else overlap**2
    assert float(found.detach()) == pytest.approx(0.3 * expected, rel=1e-5)
    found.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all((grad is not None) == name.endswith(".A") for name, grad in trained.items())
    first = load_adapter(new_base().model, runs.chain("olora", tasks=TASKS)[0], trainable=True)
    assert method.extra_loss(first, None, {}) is None  # type: ignore[arg-type]


def test_the_penalty_takes_part_in_training(runs: Runs) -> None:
    first, second = runs.chain("olora", "options.weight=0")
    assert same_adapter(first, runs.chain("olora")[0]) and not same_adapter(second, runs.chain("olora")[1])


def test_older_loras_never_change_a_bit(runs: Runs) -> None:
    """Each checkpoint's frozen part is all of its parent's, and the new LoRA is of the same size."""
    chain = runs.chain("olora", tasks=TASKS)
    for parent, child in pairwise(chain):
        before, after = tensors(parent), tensors(child)
        for name in before:
            if not name.endswith((".A", ".B")):
                continue
            stem, factor, dim = name[:-1], name[-1], 0 if name.endswith(".A") else 1
            old = [before[f"{stem}frozen_{factor}"]] if f"{stem}frozen_{factor}" in before else []
            assert same_bits(after[f"{stem}frozen_{factor}"], torch.cat([*old, before[name]], dim).contiguous()), name
            assert after[name].shape == before[name].shape
            assert after[name].any()


def test_inference_adds_all_of_them(runs: Runs, new_base: NewBase) -> None:
    """Oracle: ``W0 + s * sum_i B_i A_i`` written into the base's own weights."""
    third = runs.chain("olora", tasks=TASKS)[2]
    dense, base = new_base(), new_base()
    for name, parts in factors(third).items():
        weight = dense.model.get_submodule(name.removeprefix("base_model.model.").split(".clmoe_experts.")[0]).weight
        A = np.concatenate([parts["frozen_A"], parts["A"]])
        B = np.concatenate([parts["frozen_B"], parts["B"]], axis=1)
        assert A.shape[0] == B.shape[1] == 3 * RANK
        each = [B[:, i : i + RANK] @ A[i : i + RANK] for i in range(0, 3 * RANK, RANK)]
        assert all(np.abs(update).max() > 0 for update in each)
        weight.data += 2.0 * torch.tensor(sum(each), dtype=weight.dtype)  # type: ignore[operator]
    saved = {k: v for k, v in tensors(third).items() if "multi_modal_projector" in k}
    for name, value in saved.items():
        stem = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        dense.model.get_parameter(stem).data.copy_(value)
    batch = prompt_batch(base, ["What is it?", "Which colour is it?"])
    with torch.no_grad():
        expected = dense.model(**batch).logits
        found = load_adapter(base.model, third, trainable=False).eval()(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
