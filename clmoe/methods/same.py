"""SAME (ICML 2026): MoELoRA whose routers and experts have gradients reshaped by the spectrum of their inputs.

For each linear, with ``U [din, k]`` and ``S [k]`` the directions and standard deviations that hold ``energy`` of the
variance of its inputs ``x``, and with gradients ``g`` of the rows that act on ``x``:

- router, from step ``start`` on: ``g <- g U diag(w) U^T + (g - g U U^T)``, with ``w`` of ``router_weights``.
- A, from task 2 on, with the last task's ``U, S``: ``g <- g U diag(1 / (S + mu)) U^T + (1 / mu) (g - g U U^T)``.
- an expert's score is its use (mean gate) minus its importance (mean of gate times ``|x|^2``), both moving averages
  (0.95) scaled to 0..1 over the experts. A step freezes experts below ``tau``, except that of the task's number.

The router's spectrum is a batch's, retaken every ``every`` steps. Training mixes all experts, answers the top two. All
this is the released code's, which routes a batch as a whole and without frozen experts; here, each token by itself.
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor

from clmoe.bases.inputs import train_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.config import Config
from clmoe.data.batches import sample_records
from clmoe.errors import ClmoeError
from clmoe.experts.layer import expert_layers
from clmoe.experts.routing import RouteTrace
from clmoe.experts.spectrum import Spectrum, along, pack, router_weights, spectra_of, unpack, watch_inputs
from clmoe.methods.base import TaskContext
from clmoe.methods.lora import MoeLora
from clmoe.utils.processes import summed
from clmoe.utils.schema import Count, Inside, Positive, Share, Steps
from clmoe.utils.tensors import load_tensors, save_tensors

STATE = "input_spectra.safetensors"


@dataclass(frozen=True)
class Options:
    """SAME's own choices, in the notation above.

    Attributes:
        energy: share of the inputs' variance that the directions hold, 0.9.
        mu: damping of A's rule, 0.9.
        tau: score below which an expert is frozen, 0.1.
        window, spread, start, every: parameters of the router's rule: 3, 0.2, 10, 20.
        components: width of the sketch used for a spectrum, 64.
        samples: *open*: training records used for the spectrum at a task's end.
    """

    energy: Share = 0.9
    mu: Positive = 0.9
    tau: Share = 0.1
    window: Count = 3
    spread: Inside = 0.2
    start: Steps = 10
    every: Steps = 20
    components: Count = 64
    samples: Steps = 200


class Same(MoeLora):
    """MoELoRA whose gate is sparse when answering; nothing is added or replayed."""

    Options = Options
    needs_gradients = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.adapter.router_scope != "per_linear":
            raise ClmoeError(f"adapter.router_scope {config.adapter.router_scope}: {config.method} needs per_linear")
        self.as_trained = replace(config, adapter=replace(config.adapter, router_top_k=None))

    def adapter(self, base: LoadedBase) -> PeftConfig:
        config = super().adapter(base)
        config.router_top_k = self.config.adapter.router_top_k  # type: ignore[attr-defined]
        return config

    def begin_task(self, context: TaskContext) -> None:
        """Read the parent's spectra, watch the linears' inputs, and mix all experts."""
        stored = {} if context.previous is None else load_tensors(context.previous / STATE)
        self._past, self._index = unpack(stored, context.base.device), context.index
        self._spectra, self._use = dict[str, Spectrum](), dict[str, Tensor]()  # the latter: averages ``[2, E]``
        self._seen: dict[str, Tensor] = {}  # sums ``[3, E]`` of this step
        self._sketches = watch_inputs(context.model, self.options.components, self.config.seed)
        for layer in expert_layers(context.model).values():
            layer.routers.top_k = None  # of the live model: the checkpoint keeps its own number for the answers

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor | None:
        """Add no loss, but record what the gates of the real tokens did."""
        real = batch["attention_mask"].bool()
        for name, output in trace.outputs.items():
            gate, energy = output.gate.detach()[real], self._sketches[name].energy[real]
            sums = torch.stack([gate.sum(0), energy @ gate, torch.full_like(gate[0], len(gate))])
            self._seen[name] = self._seen[name] + sums if name in self._seen else sums
        return None

    @torch.no_grad()
    def change_gradients(self, model: PeftModel, gradients: dict[str, Tensor], step: int) -> None:
        """Reshape the gradients of every linear's router and A, and freeze experts."""
        for name, layer in expert_layers(model).items():
            sketch, router, (experts,) = self._sketches[name], layer.routers.instance[0], layer.experts.values()
            if sketch.on:
                self._spectra[name] = sketch.spectrum(self.options.energy)
            sketch.on = (step + 1) % self.options.every == 0
            g, A, B = cast(list[Tensor], [p.grad for p in (router.weight, experts.A, experts.B)])  # type: ignore[union-attr]
            if step >= self.options.start:
                w = router_weights(self._spectra[name][1], self.options.window, self.options.spread)
                g.copy_(along(g, self._spectra[name], w, 1.0))
            if name in self._past:
                A.copy_(along(A, self._past[name], 1 / (self._past[name][1] + self.options.mu), 1 / self.options.mu))
            idle = self._idle(name)
            A.mul_((~idle).repeat_interleave(experts.rank).unsqueeze(1))
            B.mul_((~idle).repeat_interleave(experts.rank))
            self.log("frozen", idle.sum())
        self._seen.clear()

    def _idle(self, name: str) -> Tensor:
        """``[E]`` bool: the experts that this step freezes."""
        use, importance, tokens = summed(self._seen[name])
        before = self._use.get(name, torch.full((2, len(use)), 1 / len(use), device=use.device))
        now = self._use[name] = 0.95 * before + 0.05 * torch.stack([use, importance]) / tokens
        low, high = now.aminmax(dim=1, keepdim=True)
        scaled = (now - low) / (high - low).clamp(min=1e-8)
        idle = scaled[0] - scaled[1] < self.options.tau
        idle[min(self._index, len(idle) - 1)] = False
        return idle

    def state(self) -> dict[str, Tensor]:
        """Spectra and moving averages; ``on``: the next step takes new spectra."""
        on = torch.tensor([sketch.on for sketch in self._sketches.values()])
        return pack(self._spectra) | {f"use.{name}": use for name, use in self._use.items()} | {"on": on}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for sketch, on in zip(self._sketches.values(), state["on"].tolist(), strict=True):
            sketch.on = on
        self._spectra = unpack(state, sketch.Q.device)
        self._use = {key[4:]: use.to(sketch.Q.device) for key, use in state.items() if key.startswith("use.")}

    def end_task(self, context: TaskContext) -> None:
        """Take the spectra of the task's inputs, for the next task."""
        width, seed, energy = self.options.components, self.config.seed, self.options.energy
        records, length = sample_records(context.records, self.options.samples, seed), self.config.training.max_length
        dataset = train_dataset(context.base, records, context.image_root, length)
        found = pack(spectra_of(context.model, context.base, dataset, width, seed, energy))
        save_tensors({key: tensor.cpu().contiguous() for key, tensor in found.items()}, context.work / STATE)


METHODS = {"same": Same}
