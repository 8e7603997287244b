"""ModalPrompt (EMNLP 2025): soft prompt tokens for each task, chosen by the image and the question of a sample.

Task t trains its ``L`` tokens ``p_t`` and a transform ``g_t`` alone; the base is frozen. After its first token a prompt
holds the tokens of up to ``K`` tasks, those of the best one last:

    z_i    = mean over the L tokens of g_i(p_i),    g_i(p) = W2 silu(W1 p + b1) + b2
    S_i(x) = ( cos(f_v(x), z_i) + cos(f_t(x), z_i) ) / 2
    loss   = CE + mean over the samples of ( 1 - cos(f_v(x), z_t) ) + ( 1 - cos(f_t(x), z_t) )

with ``f_v`` and ``f_t`` the features of image and question. In training, ``p_t`` comes last, after those of the K - 1
older tasks with the largest ``S``; at test time the K largest ``S`` decide (prompt fusion and selection).

The paper takes both features from CLIP and fixes the width of ``z``; here the frozen base gives them, as for DISCO and
HiDe-LLaVA, and their width is that of ``z``. The paper keeps every ``g_i``; since neither ``g_i`` nor ``p_i`` changes
any more, ``z_i`` says as much. *Open*: which tasks fill the other places if a locator names one task and ranks no
others (ours: those whose ``z`` is nearest).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.nn.functional import cosine_similarity

from clmoe.bases.llava import LoadedBase
from clmoe.data.batches import first_questions
from clmoe.errors import ClmoeError
from clmoe.experts.config import ExpertConfig
from clmoe.experts.forward import FeatureStore
from clmoe.experts.model import expert_config
from clmoe.experts.prompts import soft_prompts
from clmoe.experts.routing import RouteSelection, RouteTrace
from clmoe.methods.base import Method, TaskContext
from clmoe.utils.schema import Count


@dataclass(frozen=True)
class Options:
    """ModalPrompt's own choices.

    Attributes:
        length: ``L``, soft tokens of a task, 10.
        picks: ``K``, tasks whose tokens a prompt holds at most, 3.
    """

    length: Count = 10
    picks: Count = 3


class ModalPrompt(Method):
    """A task's soft tokens are frozen when it ends, and their prototype finds its samples."""

    keeps_parts: ClassVar[bool] = True
    prototypes_learned: ClassVar[bool] = True
    Options: ClassVar[type] = Options

    def adapter(self, base: LoadedBase) -> PeftConfig:
        width = base.model.config.get_text_config().hidden_size
        prompts = {"length": self.options.length, "width": width, "picks": self.options.picks, "tasks": 1}
        return ExpertConfig(router_owners=[], prompts=prompts, seed=self.config.seed, decoder=base.family.decoder)

    def soft_tokens(self, learned: int) -> int:
        return self.options.length * min(self.options.picks, learned)

    def begin_task(self, context: TaskContext) -> None:
        """Add the task's tokens, and compute what its records' features are and which older tasks they pick."""
        prompts = soft_prompts(context.model)
        if context.previous is not None:
            prompts.begin_task(expert_config(context.model))
        store = FeatureStore.of(context.base, self.config, context.features, "image_text")
        known = [row for row, record in enumerate(context.records) if not record.masked]
        questions = first_questions([context.records[row] for row in known])
        found = store.features(context.model, questions, context.image_root)
        width, given = expert_config(context.model).prompts["width"], found.shape[1] // 2  # type: ignore[index]
        if given != width:
            raise ClmoeError(
                f"locator.options.text_encoder: its features are {given} wide, the base's hidden states and so the "
                f"prototypes {width}: leave it out or name a smaller text tower"
            )
        self._features = found.new_zeros(len(context.records), 2 * width)
        self._features[known] = found
        likeness = torch.full((len(context.records), 1), 2.0)  # more than any cosine
        if (older := prompts.bank.anchors) is not None:
            likeness = torch.cat([both_cosines(self._features, older.cpu()), likeness], dim=1)
        self._weights = ranked(likeness, self.options.picks)

    def training_selection(self, model: PeftModel, rows: Tensor | None) -> RouteSelection:
        """The newest task's tokens, after those of the older tasks that a sample resembles."""
        assert rows is not None
        return RouteSelection(weights=self._weights[rows.cpu()].to(model.device))

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor | None:
        """``mean of (1 - cos(f_v, z_t)) + (1 - cos(f_t, z_t))``; a missing image counts as a cosine of 0."""
        own = soft_prompts(model).bank.prototypes()[-1:]
        features = self._features[batch["rows"].cpu()].to(own.device)
        loss = 2 * (1 - both_cosines(features, own)).mean()
        self.log("alignment", loss)
        return loss

    def prototypes(self, model: PeftModel) -> Tensor:
        return soft_prompts(model).bank.prototypes()

    def mixture(self, model: PeftModel, scores: Tensor) -> Tensor:
        """The tasks with the best scores by their ranks; of equal scores, the nearer to the best task's prototype."""
        z = self.prototypes(model).detach().cpu()
        nearness = cosine_similarity(z.unsqueeze(1), z.unsqueeze(0), dim=-1).fill_diagonal_(2)
        return ranked(scores, self.options.picks, nearness[scores.argmax(1)])


def both_cosines(features: Tensor, prototypes: Tensor) -> Tensor:
    """The mean of the cosines of ``features [B, 2 F]``, image and text, to ``prototypes [N, F]``: ``[B, N]``."""
    cosines = [cosine_similarity(f.unsqueeze(1), prototypes.unsqueeze(0), dim=-1) for f in features.chunk(2, 1)]
    return torch.stack(cosines).mean(0)


def ranked(likeness: Tensor, picks: int, ties: Tensor | None = None) -> Tensor:
    """``[B, N]``: 1 for the most alike, less in equal steps for the next, 0 after ``picks``.

    Of equals, the one with the larger ``ties [B, N]`` comes first, then the older. Samples that pick the same tasks in
    the same order have equal rows, so they can share prefixes.
    """
    first = (torch.zeros_like(likeness) if ties is None else ties).argsort(dim=1, descending=True, stable=True)
    order = first.gather(1, likeness.gather(1, first).argsort(dim=1, descending=True, stable=True))
    steps = (1 - torch.arange(likeness.shape[1]) / picks).clamp(min=0)
    return torch.zeros_like(likeness, dtype=torch.float32).scatter(1, order, steps.expand(len(likeness), -1))


METHODS = {"modalprompt": ModalPrompt}
