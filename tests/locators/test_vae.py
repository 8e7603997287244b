"""The VAE task locator: densities against float64 formulas, and a bank that only ever grows."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from clmoe.config import LocatorConfig, build
from clmoe.errors import ClmoeError
from clmoe.locators.base import Asked
from clmoe.locators.vae import Options, TaskVae, Vae, fit_vae
from clmoe.utils.tensors import same_bits

WIDTH = 24
SMALL = Options(latent=4, hidden=32, draws=4, steps=150, batch_size=64)
SHORT = Options(latent=4, hidden=16, draws=4, steps=10, batch_size=16)


def cluster(task: int, count: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    """Correlated features of a task, far from zero; the tasks' centres are about two deviations apart."""
    fixed = torch.Generator().manual_seed(100 + task)
    centre = 5 + torch.randn(width, generator=fixed)
    mix = 0.5 * torch.randn(3, width, generator=fixed)
    own = torch.Generator().manual_seed(1000 * seed + task)
    return centre + torch.randn(count, 3, generator=own) @ mix + 0.5 * torch.randn(count, width, generator=own)


def fresh(width: int, settings: Options = SMALL, seed: int = 0) -> TaskVae:
    """A VAE that was never fitted, with random standardisation and noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = TaskVae(width, settings)
        vae.shift.normal_()
        vae.scale.uniform_(0.5, 2)
        vae.noise.normal_()
    return vae.requires_grad_(False)


def locator(settings: Options = SMALL, vaes: list[TaskVae] | None = None, feature: str = "last") -> Vae:
    config = LocatorConfig("vae", feature, options=dataclasses.asdict(settings))
    made = Vae(config, seed=0)
    made.vaes = vaes or []
    return made


def z_scores(bank: Vae, features: Tensor) -> Tensor:
    return bank.scores(Asked([""] * len(features), len(bank.vaes), features))


@pytest.fixture(scope="module")
def bank() -> Vae:
    """A bank of three fitted tasks, large enough not to warn; never change it."""
    made = locator()
    with warnings.catch_warnings(action="error"):
        for task in range(3):
            made.fit(cluster(task, 300))
    return made


def test_log_density_of_4096_dimensions_is_finite_where_the_density_underflows() -> None:
    vae = fresh(4096)
    features = 3 * torch.randn(5, 4096, generator=torch.Generator().manual_seed(1))
    log_p, kl = vae.log_p_rec(features)
    assert log_p.isfinite().all() and kl.isfinite().all()
    assert (log_p < -800).all(), "the density itself is 0 in float32 and in float64"


def test_gradients_of_unlikely_draws_are_not_denormal_numbers() -> None:
    """A CPU is many times slower on denormal numbers. The value must still be that of all draws."""
    vae, generator = fresh(4096), torch.Generator().manual_seed(1)
    features = torch.randn(40, 4096, generator=generator)
    noise = torch.randn(40, 40, SMALL.latent, generator=generator).requires_grad_()
    log_p = vae.log_p_rec(features, noise)[0]
    (found,) = torch.autograd.grad(log_p.sum(), noise)
    each = torch.stack([vae.log_p_rec(features, one[None])[0] for one in noise.detach()]).double()
    torch.testing.assert_close(log_p.detach().double(), each.logsumexp(0) - np.log(40), rtol=1e-6, atol=0)
    share = (each - each.amax(0)).exp()
    assert ((share > 0) & (share < torch.finfo(torch.float32).tiny)).any(), "there are such draws"
    assert not ((found != 0) & (found.abs() < torch.finfo(torch.float32).tiny)).any()


def test_log_p_rec_equals_the_mean_of_the_densities() -> None:
    """With few dimensions and float64, the mean density can be computed as the paper writes it."""
    vae = fresh(6).double()
    features = torch.randn(7, 6, generator=torch.Generator().manual_seed(2)).double()
    log_p, kl = vae.log_p_rec(features)
    x = (features - vae.shift) / vae.scale
    posterior = Normal(*vae.encoder(x))
    torch.testing.assert_close(posterior.stddev, (1 + vae.encoder.deviation(x).exp()).log() + SMALL.sigma_floor)
    densities = [
        Normal(*vae.decoder(posterior.mean + posterior.stddev * noise)).log_prob(x).exp().prod(1) for noise in vae.noise
    ]
    torch.testing.assert_close(log_p, torch.stack(densities).mean(0).log())
    torch.testing.assert_close(kl, kl_divergence(posterior, Normal(0.0, 1.0)).sum(1))


def test_fit_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = fit_vae(cluster(0, 120), SHORT, seed=1)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    again, other = fit_vae(cluster(0, 120), SHORT, seed=1), fit_vae(cluster(0, 120), SHORT, seed=2)
    assert first.state_dict().keys() == again.state_dict().keys()
    for name, value in first.state_dict().items():
        assert same_bits(again.state_dict()[name], value), name
    assert not torch.equal(other.noise, first.noise)
    assert not torch.equal(other.encoder.mean[0].weight, first.encoder.mean[0].weight)
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_on_few_features_the_fit_ends_at_its_best_held_out_loss() -> None:
    """Oracle: fits of 50, 100 and 150 steps, which are not cut because there are as many features as steps."""
    few = dataclasses.replace(SMALL, steps=600, learning_rate=0.01, batch_size=32)
    features = cluster(0, 150)
    cut = fit_vae(features, few, seed=1)
    same, losses = [], {}
    held_out = features[torch.randperm(150, generator=torch.Generator().manual_seed(1))[:15]]
    for steps in (50, 100, 150):
        whole = fit_vae(features, dataclasses.replace(few, steps=steps), seed=1)
        log_p, kl = whole.log_p_rec(held_out)
        losses[steps] = float((kl - log_p).mean())
        same += [steps] if all(map(same_bits, whole.state_dict().values(), cut.state_dict().values())) else []
    assert same == [min(losses, key=losses.__getitem__)]


def test_three_tasks_are_told_apart_by_standard_scores(bank: Vae) -> None:
    """On new data of a task, its own scores have mean 0 and deviation 1, as far as 30 held-out instances can tell."""
    for task in range(3):
        scores = z_scores(bank, cluster(task, 400, seed=1))
        assert float((scores.argmax(1) == task).double().mean()) >= 0.95, task
        assert abs(float(scores[:, task].mean())) < 1
        assert 0.5 < float(scores[:, task].std()) < 2


def test_adding_a_task_changes_nothing_of_the_others(bank: Vae) -> None:
    grown = locator(vaes=list(bank.vaes[:2]))
    features = torch.cat([cluster(task, 20, seed=3) for task in range(4)])
    before = z_scores(grown, features)
    state = {name: value.clone() for name, value in grown.state().items()}
    grown.fit(cluster(3, 200))
    assert same_bits(z_scores(grown, features)[:, :2].contiguous(), before)
    assert all(same_bits(grown.state()[name], value) for name, value in state.items())


def test_a_saved_bank_of_eleven_tasks_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    """Names sort as 0, 1, 10, 2, but the tasks must be in the order of their numbers."""
    many = locator(vaes=[fresh(6, seed=task) for task in range(11)])
    many.save(tmp_path / "bank.safetensors")
    features = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    loaded = locator()
    loaded.load(tmp_path / "bank.safetensors")
    assert same_bits(z_scores(loaded, features), z_scores(many, features))
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "bank.safetensors").read_bytes()


def test_decisions_do_not_depend_on_the_batch(bank: Vae) -> None:
    features = torch.cat([cluster(task, 15, seed=5) for task in range(3)])
    together = z_scores(bank, features)
    alone = torch.cat([z_scores(bank, feature.unsqueeze(0)) for feature in features])
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-5)
    assert torch.equal(alone.argmax(1), together.argmax(1))


@pytest.mark.parametrize("kind", ["one", "ten", "constant", "one_constant_dimension"])
def test_degenerate_tasks_leave_a_usable_bank(kind: str) -> None:
    """Too few or constant features cause a warning; all scores stay finite, and the good task keeps its samples."""
    count = {"one": 1, "ten": 10}.get(kind, 100)
    features = cluster(1, count)
    if kind == "constant":
        features = features[:1].repeat(count, 1)
    if kind == "one_constant_dimension":
        features[:, 0] = 5.0
    bank = locator()
    bank.fit(cluster(0, 200))
    if kind == "one_constant_dimension":
        bank.fit(features)
        assert float(bank.vaes[1].scale[0]) == pytest.approx(SMALL.feature_floor)
    else:
        with pytest.warns(UserWarning, match="primitive rests on"):
            bank.fit(features)
    scores = z_scores(bank, torch.cat([cluster(0, 40, seed=6), cluster(1, 40, seed=6), features]))
    assert scores.isfinite().all()
    assert float((scores[:40].argmax(1) == 0).double().mean()) >= 0.9


@pytest.mark.parametrize("where", ["held_out", "train_last"])
def test_primitive_and_standardisation_are_those_of_their_instances(where: Any) -> None:
    """The primitive: mean and population deviation of log p_rec over held-out features, or the last ones trained on."""
    features, order = cluster(0, 120), torch.randperm(120, generator=torch.Generator().manual_seed(7))
    settings = dataclasses.replace(SHORT, steps=5, held_out=0.25, primitive_on=where, primitive_last=40)
    train, instances = (order[30:], order[:30]) if where == "held_out" else (order, order[-40:])
    vae = fit_vae(features, settings, seed=7)
    scores = vae.log_p_rec(features[instances])[0].double()
    expected = torch.stack([scores.mean(), ((scores - scores.mean()) ** 2).mean().sqrt()])
    torch.testing.assert_close(vae.primitive, expected, rtol=1e-5, atol=1e-5)
    assert vae.primitive.dtype == torch.float64
    np.testing.assert_allclose(vae.shift.numpy(), features[train].numpy().mean(0), rtol=1e-5)
    np.testing.assert_allclose(vae.scale.numpy(), features[train].numpy().std(0), rtol=1e-5)


def test_the_literal_density_has_no_gradient_where_it_underflows() -> None:
    """``objective=density`` is the paper's formula; on wide features only its KL term has a gradient."""
    wide = 3 * torch.randn(40, 2048, generator=torch.Generator().manual_seed(8))
    settings = Options(latent=4, hidden=16, draws=4, steps=3, batch_size=16, objective="density")
    with pytest.warns(UserWarning):
        vae = fit_vae(wide, settings, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = TaskVae(2048, settings)
    assert same_bits(vae.decoder.mean[2].weight, start.decoder.mean[2].weight.detach())
    assert not torch.equal(vae.encoder.mean[2].weight, start.encoder.mean[2].weight)


@pytest.mark.parametrize("name", ["feature", *(field.name for field in dataclasses.fields(Options))])
def test_a_bank_is_refused_under_settings_that_would_change_its_decisions(name: str, bank: Vae, tmp_path: Path) -> None:
    """One setting changes at a time; what matters only to the next fit is accepted. Both features are equally wide."""
    values: dict[str, Any] = {"objective": "density", "primitive_on": "train_last", "held_out": 0.3}
    bank.save(tmp_path / "bank.safetensors")
    if name == "feature":
        other, named = locator(feature="pooled"), "feature=last, not pooled"
    else:
        old = getattr(SMALL, name)
        new = values.get(name, 2 * old)
        other, named = locator(dataclasses.replace(SMALL, **{name: new})), f"{name}={old}, not {new}"
    if name in ("feature", "latent", "hidden", "draws", "sigma_floor"):
        with pytest.raises(ClmoeError, match=named):
            other.load(tmp_path / "bank.safetensors")
    else:
        other.load(tmp_path / "bank.safetensors")


@pytest.mark.parametrize(("eta", "weight_kl"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.02), (0.02, 0.7)])
def test_one_step_of_the_fit_follows_the_papers_loss(eta: float, weight_kl: float) -> None:
    """Oracle: the float64 gradient of eta * -log p_rec + lambda * KL in Adam's first step, rate * g / (|g| + 1e-8)."""
    fields = {"latent": 3, "hidden": 5, "draws": 4, "batch_size": 8, "eta": eta, "weight_kl": weight_kl}
    settings = Options(steps=1, **fields)
    features, generator = cluster(0, 40, width=6), torch.Generator().manual_seed(9)
    train = features[torch.randperm(40, generator=generator)[4:]]
    torch.randn(4, 3, generator=generator)  # the draws that are stored
    batch = train[torch.randint(36, (8,), generator=generator)].double()
    noise = torch.randn(4, 8, 3, generator=generator).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        vae = TaskVae(6, settings).double()
    x = (batch - train.mean(0).double()) / train.std(0, unbiased=False).double()
    posterior = Normal(*vae.encoder(x))
    density = Normal(*vae.decoder(posterior.mean + posterior.stddev * noise)).log_prob(x).sum(-1).exp().mean(0)
    divergence = kl_divergence(posterior, Normal(0.0, 1.0)).sum(-1)
    (eta * -density.log() + weight_kl * divergence).mean().backward()
    fitted = dict(fit_vae(features, settings, seed=9).named_parameters())
    for name, start in vae.named_parameters():
        gradient = torch.zeros_like(start) if start.grad is None else start.grad
        expected = start.detach() - settings.learning_rate * gradient / (gradient.abs() + 1e-8)
        clear = gradient.abs() > 1e-5  # elsewhere float32 may get the sign wrong
        torch.testing.assert_close(fitted[name].double()[clear], expected[clear], rtol=0, atol=1e-5, msg=name)
    assert any(not torch.equal(fitted[name].double(), start) for name, start in vae.named_parameters())


@pytest.mark.parametrize("fields", [{"held_out": 1.0}, {"draws": 0}, {"sigma_floor": 0.0}, {"primitive_last": 0}])
def test_settings_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ClmoeError, match=next(iter(fields))):
        build(Options, fields, "locator.options")
