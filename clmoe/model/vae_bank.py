"""Probabilistic task locator (LLaVA-CMoE section 3.3, PTL): one small VAE per task names a sample's task."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import softplus

from clmoe.errors import ClmoeError
from clmoe.model.llava import FeatureKind
from clmoe.model.vae_settings import VaeSettings
from clmoe.utils.tensors import load_tensors, save_tensors

# One entry of the file's metadata: safetensors writes several in no fixed order, and equal banks must be equal files.
SETTINGS = "settings"
CHUNK = 256  # samples scored at a time: several [draws, samples, D] tensors are alive then


class Gaussian(nn.Module):
    """Two FFNs that give mean and deviation of a diagonal Gaussian: ``[*, din] -> [*, dout]`` twice."""

    def __init__(self, din: int, hidden: int, dout: int, sigma_floor: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(din, hidden), nn.ReLU(), nn.Linear(hidden, dout))
        self.deviation = nn.Sequential(nn.Linear(din, hidden), nn.ReLU(), nn.Linear(hidden, dout))
        self.sigma_floor = sigma_floor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x), softplus(self.deviation(x)) + self.sigma_floor


class TaskVae(nn.Module):
    """VAE of one task's features, its standardisation and its fixed noise.

    Attributes:
        shift, scale: ``[D]``, the standardisation of the features.
        noise: ``[draws, latent]``, drawn once, so that a decision does not depend on batching.
        primitive: ``[2]`` float64, mean and deviation of log p_rec over instances of the task.
    """

    shift: Tensor
    scale: Tensor
    noise: Tensor
    primitive: Tensor

    def __init__(self, width: int, settings: VaeSettings) -> None:
        super().__init__()
        self.encoder = Gaussian(width, settings.hidden, settings.latent, settings.sigma_floor)
        self.decoder = Gaussian(settings.latent, settings.hidden, width, settings.sigma_floor)
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("noise", torch.zeros(settings.draws, settings.latent))
        self.register_buffer("primitive", torch.tensor([0.0, 1.0], dtype=torch.float64))

    def log_p_rec(self, features: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(log p_rec [B], KL [B])``: log of the mean density over the draws, in log space.

        The density itself of 4,096 dimensions underflows. ``features [B, D]``; ``noise [draws, (B,) latent]`` defaults
        to the stored draws.
        """
        x = (features - self.shift) / self.scale
        mean, sigma = self.encoder(x)
        draws = self.noise if noise is None else noise
        latent = mean + sigma * (draws.unsqueeze(1) if draws.dim() == 2 else draws)
        rec, rec_sigma = self.decoder(latent)
        log_density = -0.5 * (((x - rec) / rec_sigma) ** 2 + 2 * rec_sigma.log() + math.log(2 * math.pi)).sum(-1)
        kl = 0.5 * (mean**2 + sigma**2 - 1 - 2 * sigma.log()).sum(-1)
        return log_density.logsumexp(0) - math.log(len(draws)), kl

    def z_score(self, features: Tensor) -> Tensor:
        """How typical the features are of this task: ``[B]`` float64 standard scores of log p_rec."""
        mean, deviation = self.primitive
        return (self.log_p_rec(features)[0].double() - mean) / deviation


def fit_vae(features: Tensor, settings: VaeSettings, seed: int) -> TaskVae:
    """Fit one task's VAE on ``features [M, D]`` float32, on their device; the same result there for the same seed.

    Warns when a task is too small or constant for a reliable primitive; the bank stays usable.
    """
    generator, device = torch.Generator().manual_seed(seed), features.device
    order = torch.randperm(len(features), generator=generator)
    kept = max(1, round(settings.held_out * len(features))) if settings.primitive_on == "held_out" else 0
    held_out, train = features[order[:kept]], features[order[kept:]] if len(features) > kept else features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = TaskVae(features.shape[1], settings).to(device)
    vae.shift.copy_(train.mean(0))
    vae.scale.copy_(train.std(0, unbiased=False).clamp(min=settings.feature_floor))
    vae.noise.copy_(torch.randn(vae.noise.shape, generator=generator))
    optimizer = torch.optim.Adam(vae.parameters(), lr=settings.learning_rate)
    for _ in range(settings.steps):
        batch = train[torch.randint(len(train), (settings.batch_size,), generator=generator)]
        noise = torch.randn(settings.draws, len(batch), settings.latent, generator=generator).to(device)
        log_p, kl = vae.log_p_rec(batch, noise)
        fitness = log_p if settings.objective == "log" else log_p.exp()
        loss = (settings.eta * -fitness + settings.weight_kl * kl).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    instances = held_out if settings.primitive_on == "held_out" else train[-settings.primitive_last :]
    return _with_primitive(vae, instances, settings)


@torch.no_grad()
def _with_primitive(vae: TaskVae, instances: Tensor, settings: VaeSettings) -> TaskVae:
    """Store mean and deviation of log p_rec over the instances; freeze the VAE."""
    scores = vae.log_p_rec(instances)[0].double()
    deviation = scores.std(unbiased=False)
    if len(scores) < 10 or deviation < settings.primitive_floor:
        warnings.warn(
            f"the task locator's primitive rests on {len(scores)} instances with deviation {float(deviation):.3g}: "
            "its decisions for this task are unreliable; give the task more or more varied training records",
            stacklevel=3,
        )
    vae.primitive.copy_(torch.stack([scores.mean(), deviation.clamp(min=settings.primitive_floor)]))
    return vae.requires_grad_(False).eval()


class VaeBank:
    """The VAEs of all tasks, oldest first, on features of one kind; adding one changes nothing of the others."""

    def __init__(self, settings: VaeSettings, kind: FeatureKind, vaes: list[TaskVae] | None = None) -> None:
        self.settings, self.kind, self.vaes = settings, kind, vaes or []

    def append(self, features: Tensor, seed: int) -> None:
        """Fit the next task's VAE on ``features [M, D]``, on their device, and add it."""
        self.vaes.append(fit_vae(features.float(), self.settings, seed).cpu())

    @torch.no_grad()
    def z_scores(self, features: Tensor) -> Tensor:
        """``[B, N]`` float64 on the CPU, computed on the features' device; a sample's task has the largest."""
        vaes = [vae.to(features.device) for vae in self.vaes]
        parts = [torch.stack([vae.z_score(part) for vae in vaes], dim=1) for part in features.float().split(CHUNK)]
        return torch.cat(parts).cpu()

    def save(self, path: Path) -> None:
        """Write all VAEs to one safetensors file, whose metadata holds the settings that shape their decisions."""
        tensors = {f"vae.{i}.{k}": v for i, vae in enumerate(self.vaes) for k, v in vae.state_dict().items()}
        save_tensors(tensors, path, metadata={SETTINGS: json.dumps(_decisive(self.settings, self.kind))})

    @classmethod
    def load(cls, path: Path, settings: VaeSettings, kind: FeatureKind) -> VaeBank:
        """Read what ``save`` wrote.

        Raises:
            ClmoeError: the bank was fitted on other features, or with other widths, draws or floors than ``settings``
                say.
        """
        tensors = load_tensors(path)
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {}).get(SETTINGS, "{}"))
        for name, value in _decisive(settings, kind).items():
            if stored.get(name) != value:
                raise ClmoeError(
                    f"{path}: was fitted with options.{name}={stored.get(name)}, not {value}: "
                    "it cannot change within a sequence"
                )
        count = len({key.split(".", 2)[1] for key in tensors})
        vaes = []
        for i in range(count):
            state = {key.split(".", 2)[2]: value for key, value in tensors.items() if key.startswith(f"vae.{i}.")}
            with torch.device("meta"):  # its first weights would be drawn for nothing
                vae = TaskVae(len(state["shift"]), settings)
            vae.load_state_dict(state, assign=True)
            vaes.append(vae.requires_grad_(False).eval())
        return cls(settings, kind, vaes)


def _decisive(settings: VaeSettings, kind: FeatureKind) -> dict[str, float | str]:
    """What a fitted VAE's answers depend on besides its tensors, by the option's name."""
    names = ("latent", "hidden", "draws", "sigma_floor")
    return {"feature": kind, **{f"locator.{name}": getattr(settings, name) for name in names}}
