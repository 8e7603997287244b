"""Probe-guided knowledge extension (LLaVA-CMoE section 3.2, PGKE): where a task needs new experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clmoe.methods.statistics import over_router_outputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clmoe.data.records import TrainRecord
    from clmoe.methods.context import TaskContext
    from clmoe.model.routing import RouterOutput

Where = Literal["probed", "random", "every", "none"]


@dataclass(frozen=True)
class BlockDecision:
    """What the probes said of one block.

    Attributes:
        activations: ``[E + N_p]`` of the block's experts, probes last.
        probes: how many of them are probes.
        threshold: mean - alpha * std (population) over ``activations``.
        extend: ``N_s``, the number of experts to add.
        margin: distance of the probe nearest to the limit from it; the decision is safe where this is not small.
    """

    activations: list[float]
    probes: int
    threshold: float
    extend: int
    margin: float

    @property
    def most_active(self) -> int:
        """Index of the most activated expert, probes included; ties go to the older one."""
        return max(range(len(self.activations)), key=lambda i: (self.activations[i], -i))


def decide(activations: Tensor, probes: int, alpha: float) -> BlockDecision:
    """Count the probes whose activation is strictly above ``max(mean - alpha * std, 0)``.

    With concentrated routing ``mean - alpha * std`` is negative and a probe that is never used would pass; the floor
    at 0 stops that.

    Args:
        activations: ``[E + probes]``, the last ``probes`` entries are the probes'.
        alpha: 0.8 in the paper.
    """
    values = activations.double()
    threshold = float(values.mean() - alpha * values.std(unbiased=False))
    limit = max(threshold, 0.0)
    probed = values[-probes:]
    return BlockDecision(
        values.tolist(), probes, threshold, int((probed > limit).sum()), float((probed - limit).abs().min())
    )


def choose_blocks(decisions: dict[str, BlockDecision], where: Where, seed: int) -> dict[str, int]:
    """Number of experts to add to each block, by the probes or by an ablation.

    ``random`` gives the probes' numbers to blocks drawn at random (same total); ``every`` adds one expert to each
    block; ``none`` adds nothing.
    """
    if where == "none":
        return dict.fromkeys(decisions, 0)
    if where == "every":
        return dict.fromkeys(decisions, 1)
    counts = {block: decision.extend for block, decision in decisions.items()}
    if where == "random":
        blocks = list(counts)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
        return {block: counts[blocks[k]] for block, k in zip(blocks, order, strict=True)}
    return counts


def average_expert(A: Tensor, B: Tensor, rank: int, copies: int) -> tuple[Tensor, Tensor]:
    """``copies`` experts that each equal the mean of the factors of all given ones: how probes start.

    ``A [E*r, din]``, ``B [dout, E*r]`` -> ``A [copies*r, din]``, ``B [dout, copies*r]``.
    """
    mean_A = A.detach().view(-1, rank, A.shape[1]).mean(0)
    mean_B = B.detach().reshape(B.shape[0], -1, rank).mean(1)
    return mean_A.repeat(copies, 1), mean_B.repeat(1, copies)


def pick_expert(A: Tensor, B: Tensor, rank: int, index: int) -> tuple[Tensor, Tensor]:
    """A copy of expert ``index``: how the experts of an extended block start. ``A [r, din]``, ``B [dout, r]``."""
    rows = slice(index * rank, (index + 1) * rank)
    return A[rows].detach().clone(), B[:, rows].detach().clone()


def extend_router(weight: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """A copy of ``weight [E, din]`` with ``rows`` new ones from ``N(0, std of the copied rows)``."""
    old = weight.detach().cpu()
    new = torch.randn(rows, old.shape[1], generator=generator) * old.std(unbiased=False)
    return torch.cat([old, new])


def balance_loss(logits: Tensor, gate: Tensor, mask: Tensor) -> Tensor:
    """Switch Transformer's balance loss of one router, a mean over samples.

    ``E * sum_e f_e P_e`` with ``f_e`` the share of picks and ``P_e`` the mean softmax probability, both over one
    sample's non-padding tokens, so that the loss does not depend on how a batch is cut. 1 when balanced.

    Args:
        logits, gate: ``[B, T, E]`` float32; an expert is picked where its gate is positive.
        mask: ``[B, T]``, nonzero where a token is real.
    """
    real = mask.unsqueeze(-1).to(logits.dtype)
    tokens = real.sum(1)
    picked = (gate > 0).to(logits.dtype) * real
    share = picked.sum(1) / picked.sum((1, 2)).unsqueeze(-1)
    probability = (logits.softmax(-1) * real).sum(1) / tokens
    return (logits.shape[-1] * (share * probability).sum(-1)).mean()


def plan_as_json(decisions: dict[str, BlockDecision], added: dict[str, int]) -> dict[str, Any]:
    """The plan as it is saved: per block the activations, the threshold, its margin, and what was added."""
    return {
        block: {
            "activations": decision.activations,
            "probes": decision.probes,
            "threshold": decision.threshold,
            "margin": decision.margin,
            "probed": decision.extend,
            "added": added[block],
        }
        for block, decision in decisions.items()
    }


def measure_activations(
    context: TaskContext, records: Sequence[TrainRecord], kind: Literal["frequency", "logit"]
) -> dict[str, Tensor]:
    """Activation of every expert of every patched module under the newest routers, ``[E]`` float64.

    ``frequency``: share of non-padding tokens whose top-k holds the expert, from int64 counts; ``logit``: mean logit.
    """

    def total(output: RouterOutput, mask: Tensor) -> tuple[Tensor, int]:
        real = mask.bool()
        values = (output.gate[real] > 0).sum(0) if kind == "frequency" else output.logits[real].double().sum(0)
        return values.cpu(), int(real.sum())

    batches = over_router_outputs(context, records, total)
    activations = {}
    for name in batches[0]:
        values, tokens = zip(*(batch[name] for batch in batches), strict=True)
        activations[name] = torch.stack(values).sum(0).double() / sum(tokens)
    return activations
