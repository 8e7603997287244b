"""PGKE's steps (LLaVA-CMoE, section 3.2): how probes start, how they are measured, and what they decide."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clmoe.data.records import TrainRecord
from clmoe.experts.routing import RouterOutput
from clmoe.methods.base import TaskContext, router_sums

Where = Literal["probed", "random", "every", "none"]


def measure_activations(
    context: TaskContext, records: Sequence[TrainRecord], kind: Literal["frequency", "logit"]
) -> dict[str, Tensor]:
    """Share of real tokens whose top-k includes each expert, or its mean logit: patched module -> ``[E]`` float64."""

    def count(output: RouterOutput, mask: Tensor) -> tuple[Tensor, Tensor]:
        real = mask.bool()
        values = (output.gate[real] > 0).sum(0) if kind == "frequency" else output.logits[real].double().sum(0)
        return values.cpu(), real.sum().cpu()

    sums = router_sums(context, records, count)
    return {name: values.double() / tokens for name, (values, tokens) in sums.items()}


@dataclass(frozen=True)
class BlockDecision:
    """What the probes showed for one block, as written to the file.

    Attributes:
        activations: those of the block's experts, ``[E + N_p]``, the ``probes`` last.
        threshold: mean - alpha * std (population) over ``activations``.
        margin: distance between the limit and the probe nearest to it; the decision is safe unless this is small.
        probed: ``N_s``, the number of experts to add.
    """

    activations: list[float]
    probes: int
    threshold: float
    margin: float
    probed: int

    @property
    def most_active(self) -> int:
        """Index of the most activated expert, probes included; ties go to the older one."""
        return max(range(len(self.activations)), key=lambda i: (self.activations[i], -i))


def decide(activations: Tensor, probes: int, alpha: float) -> BlockDecision:
    """Count the probes, the last of ``activations [E + probes]``, that are above ``max(mean - alpha * std, 0)``.

    The floor at 0 rejects unused probes where concentrated routing makes ``mean - alpha * std`` negative.
    """
    values = activations.double()
    threshold = float(values.mean() - alpha * values.std(unbiased=False))
    above = values[-probes:] - max(threshold, 0.0)
    return BlockDecision(values.tolist(), probes, threshold, float(above.abs().min()), int((above > 0).sum()))


def choose_blocks(decisions: dict[str, BlockDecision], where: Where, seed: int) -> dict[str, int]:
    """Number of experts to add to each block; ``random`` gives the probes' numbers to blocks drawn at random."""
    if where in ("none", "every"):
        return dict.fromkeys(decisions, int(where == "every"))
    counts = [decision.probed for decision in decisions.values()]
    if where == "random":
        order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed)).tolist()
        counts = [counts[k] for k in order]
    return dict(zip(decisions, counts, strict=True))


def average_expert(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The mean of all experts' factors, with which probes start: ``A [E*r, din]``, ``B [dout, E*r]`` -> of one."""
    mean_A = A.detach().view(-1, rank, A.shape[1]).mean(0)
    return mean_A, B.detach().reshape(B.shape[0], -1, rank).mean(1)


def pick_expert(A: Tensor, B: Tensor, rank: int, index: int) -> tuple[Tensor, Tensor]:
    """A copy of expert ``index``, with which a block's new experts start: ``A [r, din]``, ``B [dout, r]``."""
    rows = slice(index * rank, (index + 1) * rank)
    return A[rows].detach().clone(), B[:, rows].detach().clone()


def extend_router(weight: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """A copy of ``weight [E, din]`` with ``rows`` new rows from ``N(0, std of the copied rows)``."""
    old = weight.detach().cpu()
    new = torch.randn(rows, old.shape[1], generator=generator) * old.std(unbiased=False)
    return torch.cat([old, new])
