"""Probabilistic task locator (LLaVA-CMoE section 3.3, PTL): one small VAE per task names a sample's task."""

import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from clmoe.config import LocatorConfig
from clmoe.locators.base import Asked, Locator
from clmoe.utils.logging import Progress
from clmoe.utils.processes import device
from clmoe.utils.schema import Count, Inside, LearningRate, NotNegative, Positive, Range, Steps


@dataclass(frozen=True)
class Options:
    """All are *open* in the paper except ``eta`` and ``weight_kl`` (1e-3 each, so 1 : 1 in a phase of its own).

    Attributes:
        latent, hidden: widths.
        draws: latent draws per reconstruction probability.
        steps, batch_size, learning_rate: of the fit. With fewer features than steps it ends, at its best weights, when
            the held-out loss has not fallen for ``PATIENCE`` steps: on so few features a VAE memorises single samples.
        eta, weight_kl: weights of the reconstruction and of the KL divergence in the loss.
        held_out: share of the features held out for the primitive, if it is computed on held-out features.
        primitive_on, primitive_last: the primitive's instances: ``held_out``, or the last so many of those trained on.
        objective: ``log`` maximises log p_rec; ``density`` maximises the literal p_rec of the paper.
        feature_floor, sigma_floor, primitive_floor: least deviation of features, of decoder and latent, of log p_rec.
    """

    latent: Count = 64
    hidden: Count = 512
    draws: Annotated[int, Range(1, 1024)] = 8
    steps: Steps = 2000
    batch_size: Count = 128
    learning_rate: LearningRate = 1e-3
    held_out: Inside = 0.1
    primitive_on: Literal["held_out", "train_last"] = "held_out"
    primitive_last: Steps = 1000
    objective: Literal["log", "density"] = "log"
    eta: NotNegative = 1e-3
    weight_kl: NotNegative = 1e-3
    feature_floor: Positive = 1e-3
    sigma_floor: Positive = 1e-2
    primitive_floor: Positive = 1e-2


CHECK, PATIENCE = 50, 150  # steps between checks of the held-out loss; steps without a better one that end the fit
NEGLIGIBLE = 60.0  # in log density, below a sample's likeliest draw: e^-60 of a sum is far below float32's precision


class Gaussian(nn.Module):
    """Two FFNs that give the mean and standard deviation of a diagonal Gaussian: ``[*, din] -> [*, dout]`` twice."""

    def __init__(self, din: int, hidden: int, dout: int, sigma_floor: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(din, hidden), nn.ReLU(), nn.Linear(hidden, dout))
        self.deviation = nn.Sequential(nn.Linear(din, hidden), nn.ReLU(), nn.Linear(hidden, dout))
        self.sigma_floor = sigma_floor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x), softplus(self.deviation(x)) + self.sigma_floor


class TaskVae(nn.Module):
    """VAE of one task's features.

    ``shift`` and ``scale [D]`` standardise the features, ``noise [draws, latent]`` is drawn once, and ``primitive [2]``
    float64 is the mean and standard deviation of log p_rec over instances of the task.
    """

    shift: Tensor
    scale: Tensor
    noise: Tensor
    primitive: Tensor

    def __init__(self, width: int, settings: Options) -> None:
        super().__init__()
        self.encoder = Gaussian(width, settings.hidden, settings.latent, settings.sigma_floor)
        self.decoder = Gaussian(settings.latent, settings.hidden, width, settings.sigma_floor)
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("noise", torch.zeros(settings.draws, settings.latent))
        self.register_buffer("primitive", torch.tensor([0.0, 1.0], dtype=torch.float64))

    def log_p_rec(self, features: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(log p_rec [B], KL [B])`` of features ``[B, D]``; p_rec, the mean density over the draws, may underflow.

        ``noise [draws, (B,) latent]`` defaults to the stored one.
        """
        x = (features - self.shift) / self.scale
        mean, sigma = self.encoder(x)
        draws = self.noise if noise is None else noise
        latent = mean + sigma * (draws.unsqueeze(1) if draws.dim() == 2 else draws)
        rec, rec_sigma = self.decoder(latent)
        log_density = -0.5 * (((x - rec) / rec_sigma) ** 2 + 2 * rec_sigma.log() + math.log(2 * math.pi)).sum(-1)
        # such a draw's gradients would be denormal numbers, on which a CPU is many times slower
        log_density = log_density.masked_fill(log_density < log_density.amax(0) - NEGLIGIBLE, -math.inf)
        kl = 0.5 * (mean**2 + sigma**2 - 1 - 2 * sigma.log()).sum(-1)
        return log_density.logsumexp(0) - math.log(len(draws)), kl


def fit_vae(features: Tensor, settings: Options, seed: int, title: str = "locator") -> TaskVae:
    """Fit one task's VAE on ``features [M, D]`` float32; warns if they are too few or too constant for the primitive.

    ``title`` names the progress row.
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
    _train(vae, train, held_out if len(features) < settings.steps else held_out[:0], settings, generator, title)
    vae.requires_grad_(False).eval()
    instances = held_out if settings.primitive_on == "held_out" else train[-settings.primitive_last :]
    scores = vae.log_p_rec(instances)[0].double()
    deviation = scores.std(unbiased=False)
    if len(scores) < 10 or deviation < settings.primitive_floor:
        warnings.warn(
            f"the task locator's primitive rests on {len(scores)} instances with deviation {float(deviation):.3g}: "
            "its decisions for this task are unreliable; give the task more, or more varied, training records",
            stacklevel=2,
        )
    vae.primitive.copy_(torch.stack([scores.mean(), deviation.clamp(min=settings.primitive_floor)]))
    return vae


def _train(
    vae: TaskVae, train: Tensor, watched: Tensor, settings: Options, generator: torch.Generator, title: str
) -> None:
    """Take ``settings.steps`` steps on ``train [M, D]``, or fewer if ``watched [W, D]`` holds features to stop by."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=settings.learning_rate, fused=True)
    least, best, best_step = math.inf, vae.state_dict(), 0
    with Progress(title, settings.steps, []) as progress:
        for step in range(1, settings.steps + 1):
            batch = train[torch.randint(len(train), (settings.batch_size,), generator=generator)]
            noise = torch.randn(settings.draws, len(batch), settings.latent, generator=generator).to(train.device)
            loss = _loss(vae, batch, settings, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % CHECK:
                continue
            progress.show(float(loss.detach()))
            progress.advance(CHECK * len(batch), CHECK)
            if not len(watched):
                continue
            with torch.no_grad():  # with the stored noise, the same in every check
                now = float(_loss(vae, watched, settings))
            if now < least:
                least, best_step = now, step
                best = {name: value.clone() for name, value in vae.state_dict().items()}
            elif step - best_step >= PATIENCE:
                break
    if len(watched):
        vae.load_state_dict(best)


def _loss(vae: TaskVae, features: Tensor, settings: Options, noise: Tensor | None = None) -> Tensor:
    log_p, kl = vae.log_p_rec(features, noise)
    fitness = log_p if settings.objective == "log" else log_p.exp()
    return (settings.eta * -fitness + settings.weight_kl * kl).mean()


class Vae(Locator):
    """The VAEs of all tasks, oldest first."""

    Options = Options
    decisive = ("latent", "hidden", "draws", "sigma_floor")

    def __init__(self, config: LocatorConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.vaes: list[TaskVae] = []

    def fit(self, features: Tensor) -> None:
        """Fit the next task's VAE, on this process's GPU where there is one."""
        seed = self.seed + len(self.vaes)
        title = f"locator, task {len(self.vaes) + 1}"
        self.vaes.append(fit_vae(features.float().to(device()), self.options, seed, title).cpu())

    @torch.no_grad()
    def scores(self, asked: Asked) -> Tensor:
        """Standard scores of log p_rec under each task's primitive."""
        assert asked.features is not None
        features, scores = asked.features.float().to(device()), []
        for vae in self.vaes[: asked.tasks]:
            mean, deviation = vae.to(features.device).primitive
            scores.append((vae.log_p_rec(features)[0].double() - mean) / deviation)
        return torch.stack(scores, dim=1).cpu()

    def state(self) -> dict[str, Tensor]:
        return {f"vae.{i}.{name}": value for i, vae in enumerate(self.vaes) for name, value in vae.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.vaes = []
        for i in range(len({key.split(".", 2)[1] for key in state})):
            tensors = {key.split(".", 2)[2]: value for key, value in state.items() if key.startswith(f"vae.{i}.")}
            with torch.device("meta"):  # drawing initial weights would be wasted
                vae = TaskVae(len(tensors["shift"]), self.options)
            vae.load_state_dict(tensors, assign=True)
            self.vaes.append(vae.requires_grad_(False).eval())
