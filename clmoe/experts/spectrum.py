"""The directions in which the inputs of adapted linears vary, and how much: from sketches that add up over batches."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad

from clmoe.bases.inputs import over_train_batches
from clmoe.bases.llava import LoadedBase
from clmoe.data.batches import TrainDataset
from clmoe.experts.forward import adapted_base
from clmoe.experts.layer import ExpertLayer, expert_layers, seeded
from clmoe.experts.routing import NEWEST_ROUTER, RouteTrace, current_routing, routing
from clmoe.utils.processes import summed

Spectrum = tuple[Tensor, Tensor]
"""Directions ``U [din, k]``, orthonormal, and standard deviations ``S [k]``, largest first; float32."""


class InputSketch:
    """Before a linear ``[.., din]``, gathers ``C Q`` of its inputs' covariance ``C`` while ``on``; ``Q [din, width]``.

    It looks at the real tokens of passes with a ``RouteTrace``; the recomputation of a pass has none. ``energy
    [B, T]`` is the squared length of the newest inputs.
    """

    energy: Tensor

    def __init__(self, layer: ExpertLayer, width: int, seed: int) -> None:
        (linear,) = (module for module in layer.base_layer.modules() if isinstance(module, nn.Linear))
        Q = torch.randn(linear.in_features, width, generator=seeded(seed, f"sketch:{layer.name}"))
        self.Q = Q[:, : linear.in_features].to(linear.weight.device)
        self.on = True
        self._clear()
        layer.register_forward_pre_hook(self)

    def _clear(self) -> None:
        self.Y, self.total = torch.zeros_like(self.Q), torch.zeros_like(self.Q[:, 0])
        self.tokens = torch.zeros((), device=self.Q.device)

    @torch.no_grad()
    def __call__(self, module: Any, arguments: tuple[Tensor, ...]) -> None:
        _, trace = current_routing() or (None, None)
        if trace is None:
            return
        x = arguments[0].float()
        self.energy = x.square().sum(-1)
        if self.on:
            rows = x.flatten(0, -2) if trace.real is None else x[trace.real]
            self.Y += rows.t() @ (rows @ self.Q)
            self.total += rows.sum(0)
            self.tokens += len(rows)

    def spectrum(self, share: float) -> Spectrum:
        """``leading`` of all processes' inputs so far, which are then forgotten."""
        Y, total, tokens = (summed(part) for part in (self.Y, self.total, self.tokens))
        mean = total / tokens
        U, S = leading(Y / tokens - torch.outer(mean, mean @ self.Q), self.Q, share)
        self._clear()
        return U, S


def watch_inputs(model: nn.Module, width: int, seed: int) -> dict[str, InputSketch]:
    """A sketch before every patched linear of a model whose routers are ``per_linear``, by name."""
    return {name: InputSketch(layer, width, seed) for name, layer in expert_layers(model).items()}


def spectra_of(
    model: PeftModel, base: LoadedBase, dataset: TrainDataset, width: int, seed: int, share: float
) -> dict[str, Spectrum]:
    """Spectra of the linears' inputs on whole training records, dropout off; one at a time, so that none is padded."""
    sketches, adapted = watch_inputs(model, width, seed), adapted_base(model.eval())

    def read(batch: dict[str, Tensor]) -> None:
        inputs = {name: value for name, value in batch.items() if name not in ("attention_mask", "labels")}
        adapted(**inputs, use_cache=False)

    with torch.no_grad(), routing(NEWEST_ROUTER, RouteTrace()):
        over_train_batches(base, dataset, 1, read)
    return {name: sketch.spectrum(share) for name, sketch in sketches.items()}


def pack(spectra: dict[str, Spectrum]) -> dict[str, Tensor]:
    """``U.<linear>`` and ``S.<linear>``, for a file."""
    return {f"{kind}.{name}": part for name, pair in spectra.items() for kind, part in zip("US", pair, strict=True)}


def unpack(tensors: dict[str, Tensor], device: torch.device | str) -> dict[str, Spectrum]:
    """What ``pack`` flattened, among other tensors."""
    names = [key.removeprefix("U.") for key in tensors if key.startswith("U.")]
    return {name: (tensors[f"U.{name}"].to(device), tensors[f"S.{name}"].to(device)) for name in names}


def router_weights(S: Tensor, window: int, spread: float) -> Tensor:
    """SAME's weights ``w [k]`` of a router's directions: ``1 / S`` with ``S`` averaged over the last ``window``.

    They are divided by the largest and kept within ``1 +- spread``.
    """
    averaged = torch.arange(1, len(S) + 1, device=S.device).clamp(max=window)
    inverse = 1 / (pad(S, (window - 1, 0)).unfold(0, window, 1).sum(1) / averaged + 1e-6)
    return (inverse / inverse.max()).clamp(1 - spread, 1 + spread)


def along(g: Tensor, spectrum: Spectrum, weights: Tensor, rest: float) -> Tensor:
    """``g U diag(weights) U^T + rest * (g - g U U^T)`` of ``g [n, din]``, with ``weights [k]``."""
    U, _ = spectrum
    inside = g @ U
    return (inside * weights) @ U.t() + rest * (g - inside @ U.t())


def leading(Y: Tensor, Q: Tensor, share: float) -> Spectrum:
    """The fewest directions that hold ``share`` of the variance that the sketch has seen.

    ``Y = C Q`` of a covariance ``C [din, din]``: the shifted Nystroem approximation (Tropp et al., NeurIPS 2017,
    algorithm 3), in float64; exact where ``C`` has no higher rank than ``Q [din, width]`` has columns.
    """
    Y, Q = Y.double(), Q.double()
    shift = torch.finfo(torch.float32).eps * Y.norm() + torch.finfo(torch.float64).tiny
    Y = Y + shift * Q
    core = Q.t() @ Y
    root = torch.linalg.cholesky((core + core.t()) / 2)
    U, F, _ = torch.linalg.svd(torch.linalg.solve_triangular(root, Y.t(), upper=False).t(), full_matrices=False)
    variance = (F.square() - shift).clamp(min=0)
    k = int((variance.cumsum(0) < share * variance.sum()).sum()) + 1
    return U[:, :k].float(), variance[:k].sqrt().float()
