"""Soft prompt tokens: learned embeddings for the places that ``LoadedBase.soft_tokens`` keeps open in every prompt."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from clmoe.bases.llava import SOFT
from clmoe.experts.config import ExpertConfig
from clmoe.experts.routing import NEWEST_ROUTER, current_routing
from clmoe.utils.names import derived_seed


class PromptBank(nn.Module):
    """``L`` soft tokens of width ``D`` for each of ``N`` tasks, oldest first; each task has a prototype of width ``F``.

    ``prompt [L, D]`` and ``transform``, which makes the prototype, are the newest task's and train. Buffers keep those
    of older tasks, ``frozen [N-1, L, D]`` and ``anchors [N-1, F]``; None without older tasks. All are float32.
    """

    frozen: Tensor | None
    anchors: Tensor | None

    def __init__(self, prompt: Tensor, width: int, tasks: int, generator: torch.Generator) -> None:
        super().__init__()
        (L, D), older = prompt.shape, tasks - 1
        self.prompt = nn.Parameter(prompt)
        self.transform = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, width)).float()
        self._restart(generator)
        self.register_buffer("frozen", torch.zeros(older, L, D) if older else None)
        self.register_buffer("anchors", torch.zeros(older, width) if older else None)

    def _restart(self, generator: torch.Generator) -> None:
        """A fresh transform, uniform in +-1/sqrt(D), as ``nn.Linear`` starts."""
        bound = self.prompt.shape[1] ** -0.5
        for parameter in self.transform.parameters():
            fresh = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
            parameter.data.copy_(fresh)

    def tokens(self) -> Tensor:
        """``[N, L, D]``: all tasks' tokens."""
        own = self.prompt.unsqueeze(0)
        return own if self.frozen is None else torch.cat([self.frozen, own])

    def prototypes(self) -> Tensor:
        """``[N, F]``: the mean of each task's transformed tokens."""
        own = self.transform(self.prompt).mean(0, keepdim=True)
        return own if self.anchors is None else torch.cat([self.anchors, own])

    @torch.no_grad()
    def begin(self, prompt: Tensor, generator: torch.Generator) -> None:
        """Freeze what is there, and start the next task with the tokens ``prompt [L, D]`` and a fresh transform."""
        self.frozen, self.anchors = self.tokens().clone(), self.prototypes().clone()
        self.prompt = nn.Parameter(prompt.to(self.prompt))
        self._restart(generator)


class SoftPrompts(nn.Module, BaseTunerLayer):
    """The token embedding, with tokens of the chosen tasks at the open places."""

    adapter_layer_names = ("clmoe_prompts",)

    def __init__(self, base_layer: nn.Embedding, name: str) -> None:
        super().__init__()
        self.base_layer, self.name = base_layer, name
        self.clmoe_prompts = nn.ModuleDict()

    def attach(self, adapter: str, config: ExpertConfig) -> None:
        """Build a bank of the shape that ``config`` describes, with fresh weights."""
        assert config.prompts is not None
        self.picks, self.length, tasks = config.prompts["picks"], config.prompts["length"], config.prompts["tasks"]
        generator = self._generator(config.seed, tasks)
        bank = PromptBank(self._words(generator), config.prompts["width"], tasks, generator)
        self.clmoe_prompts[adapter] = bank.to(self.base_layer.weight.device)

    def begin_task(self, config: ExpertConfig) -> None:
        """Freeze the tokens of all tasks so far and add fresh ones, also in ``config``."""
        assert config.prompts is not None
        config.prompts["tasks"] += 1
        generator = self._generator(config.seed, config.prompts["tasks"])
        self.bank.begin(self._words(generator), generator)

    def _generator(self, seed: int, tasks: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(seed, f"{self.name}.prompts.{tasks}"))

    def _words(self, generator: torch.Generator) -> Tensor:
        """The embeddings of ``L`` random words, ``[L, D]`` float32: soft tokens start as these."""
        words = torch.randint(self.base_layer.num_embeddings, (self.length,), generator=generator)
        return self.base_layer(words.to(self.base_layer.weight.device)).detach().float()

    @property
    def bank(self) -> PromptBank:
        (adapter,) = self.active_adapters
        return self.clmoe_prompts[adapter]  # type: ignore[return-value]

    def forward(self, input_ids: Tensor) -> Tensor:
        """``[B, T]`` int64 -> ``[B, T, D]``; ids from ``SOFT`` on are open places, counted from there.

        They get the tokens of the ``picks`` tasks with the largest ``weights`` in the routing (without any: of the
        newest tasks), the largest last.
        """
        places = input_ids >= SOFT
        if self.disable_adapters or not bool(places.any()):
            return self.base_layer(input_ids)
        selection, _ = current_routing() or (NEWEST_ROUTER, None)
        tokens = self.bank.tokens()
        N, B = len(tokens), len(input_ids)
        weights = torch.arange(N).expand(B, N) if selection.weights is None else selection.weights
        chosen = weights.argsort(dim=1, stable=True)[:, -self.picks :].to(tokens.device)
        filled = tokens[chosen].flatten(1, 2)  # [B, picks * L, D]
        rows, columns = places.nonzero(as_tuple=True)
        hidden = self.base_layer(input_ids.masked_fill(places, 0))
        soft = filled[rows, input_ids[rows, columns] - SOFT].to(hidden.dtype)
        return hidden.index_put((rows, columns), soft)


def soft_prompts(model: nn.Module) -> SoftPrompts:
    """The one patched embedding of a model whose adapter has soft prompts."""
    (found,) = (module for module in model.modules() if isinstance(module, SoftPrompts))
    return found
