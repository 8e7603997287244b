"""MR-LoRA's router: the question it reads, the records it trains on, and its place beside the tasks' LoRAs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel

from clmoe.data.records import TrainRecord, Turn
from clmoe.experts.layer import expert_layers, seeded
from clmoe.experts.model import expert_config, grow_experts, tensor_name
from clmoe.experts.routing import LETTER_ROUTER
from clmoe.methods.memory import Remembered
from clmoe.utils.tensors import load_tensors


def referral(question: str, experts: Mapping[str, str]) -> str:
    """The question whose answer is the letter of one of ``experts``, letter -> description."""
    listed = [f"{letter}. {description}" for letter, description in experts.items()]
    ask, end = "Which of these experts should answer the question?", "Do not answer it, give the letter alone."
    return "\n".join([ask, *listed, f"Question: {question}", end])


def router_records(
    memory: Sequence[Remembered], letters: Sequence[str], ask: Callable[[str], str]
) -> list[TrainRecord]:
    """Every stored record, with ``ask`` of its question as the question and its task's letter as the answer."""
    return [
        TrainRecord(record.id, record.image, (Turn(ask(record.turns[0].question), letter),))
        for letter, past in zip(letters, memory, strict=True)
        for record in past.records
    ]


def begin_beside(model: PeftModel, tasks: int, rank: int, seed: int) -> None:
    """As released: fresh experts of ``rank`` next to the frozen LoRAs of ``tasks``, which count ``1 / tasks`` each."""
    config, factors = expert_config(model), {}
    config.pick = "sum"
    for name, layer in expert_layers(model).items():
        ((linear, experts),) = layer.experts.items()
        (A, B), width = experts.packed(), tasks * experts.rank
        experts.frozen_A, experts.frozen_B = A[-width:].clone(), B[:, -width:] / tasks
        config.layout[layer.block], layer.routers.pick = list(range(tasks)), "sum"
        fresh = experts.fresh(rank // experts.rank, seeded(seed, f"mrlora:{tasks}:{name}"))
        factors[name] = {linear: (fresh[0].to(A), fresh[1].to(B))}
    grow_experts(model, tasks, factors)


def place_router(model: PeftModel, tasks: int, file: Path, kind: str) -> None:
    """Put the router of ``file``, its tensors named ``kind``, before the LoRAs of ``tasks``, replacing an older one."""
    router, config = load_tensors(file), expert_config(model)
    for name, layer in expert_layers(model).items():
        old = layer.routers.owners.count(LETTER_ROUTER)
        for linear, experts in layer.experts.items():
            names = (tensor_name(name, kind.format(linear=linear, factor=factor)) for factor in "AB")
            own_A, own_B = experts.packed()
            A, B = (router[key].to(own_A.device) for key in names)
            experts.frozen_A = torch.cat([A, own_A[old * experts.rank :]])
            experts.frozen_B = torch.cat([B, own_B[:, old * experts.rank :]], dim=1)
            count = len(A) // experts.rank
        config.layout[layer.block] = [LETTER_ROUTER] * count + list(range(tasks))
        layer.routers.owners = list(config.layout[layer.block])
