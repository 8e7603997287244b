"""The recipe of the playground's base: first the vision tower alone, then projector and language model.

`python -m clmoe.benchmarks.playground.pretrain OUT` writes a folder that `from_pretrained` reads, and
recipe.json. Everything is drawn from one seed; on one thread (OMP_NUM_THREADS=1) of one machine the weights
repeat bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from clmoe.benchmarks.playground.lexicon import every_answer_word
from clmoe.benchmarks.playground.mixture import sample_scene, sample_turns
from clmoe.benchmarks.playground.packing import PackedBatch, TurnPacker
from clmoe.benchmarks.playground.sampling import draw
from clmoe.benchmarks.playground.scenes import Scene, render
from clmoe.benchmarks.playground.tasks import CL4VQA_TASKS, COIN_TASKS
from clmoe.benchmarks.playground.vision_targets import VisionHeads, vision_targets
from clmoe.data.prompts import SYSTEM
from clmoe.model.tiny import TinySizes, build_tiny
from clmoe.utils.files import json_sha256


@dataclass(frozen=True)
class PretrainRecipe:
    """All that decides the base."""

    seed: int = 0
    sizes: TinySizes = field(default_factory=TinySizes)
    images: int = 48_000
    vision_steps: int = 5_000
    vision_batch: int = 64
    vision_lr: float = 2e-3
    language_steps: int = 5_500
    language_batch: int = 8
    language_lr: float = 1.5e-3
    turns_per_image: int = 12
    tokens_per_row: int = 200
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def digest(self) -> str:
        """Hash of the recipe's values."""
        return json_sha256(asdict(self))[:16]


@dataclass(frozen=True)
class ImagePool:
    """Scenes of the base's split and their pixels [N, 3, 56, 56] uint8."""

    scenes: list[Scene]
    pixels: Tensor

    @classmethod
    def sample(cls, count: int, seed: int) -> ImagePool:
        """Draw and render `count` scenes of the mixture."""
        rng = Random(f"pool/{seed}")
        scenes = [sample_scene(rng) for _ in range(count)]
        pixels = np.stack([np.asarray(render(scene)) for scene in scenes]).transpose(0, 3, 1, 2)
        return cls(scenes, torch.from_numpy(np.ascontiguousarray(pixels)))


def tokenizer_texts(seed: int) -> Iterator[str]:
    """The template, the mixture, and the words of all tasks: what the tokenizer must know as whole words."""
    rng = Random(f"tokenizer/{seed}")
    yield f"{SYSTEM} USER: \nASSISTANT: USER: ASSISTANT:"
    for word in every_answer_word():
        yield f" {word}"
    for _ in range(4_000):
        for question, answer in sample_turns(sample_scene(rng), rng, 4):
            yield f"\n{question} ASSISTANT: {answer}"
    for spec in COIN_TASKS + CL4VQA_TASKS:
        for _ in range(200):
            scene = draw(rng.choice(spec.samplers), "train", rng, spec.backgrounds)
            for qa in spec.ask(scene, rng):
                yield f"\n{qa.question} ASSISTANT: {qa.answer}"


def mixture_hash(recipe: PretrainRecipe) -> str:
    """Hash of what the recipe's values do not say: the words the tokenizer sees, and the first images of the pool."""
    digest = hashlib.sha256()
    for text in tokenizer_texts(recipe.seed):
        digest.update(text.encode())
    digest.update(ImagePool.sample(min(recipe.images, 256), recipe.seed).pixels.numpy().tobytes())
    return digest.hexdigest()[:16]


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to the float32 the processor makes: -1..1."""
    return pixels.float() / 127.5 - 1.0


def patch_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the projector receives: [B, patches, vision hidden], of the layer before the last, no CLS."""
    tower = model.model.vision_tower
    return tower(normalise(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]


def _optimiser(
    parameters: list[nn.Parameter], lr: float, steps: int, recipe: PretrainRecipe
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.98))

    def scale(step: int) -> float:
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, scale)


def train_vision(model: LlavaForConditionalGeneration, pool: ImagePool, recipe: PretrainRecipe) -> None:
    """Supervised stand-in for CLIP's pre-training: what, where, which colour, per image and per patch."""
    heads = VisionHeads(recipe.sizes.vision_hidden)
    parameters = [*model.model.vision_tower.parameters(), *heads.parameters()]
    optimiser, schedule = _optimiser(parameters, recipe.vision_lr, recipe.vision_steps, recipe)
    targets = vision_targets(pool.scenes)
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.vision_steps):
        rows = torch.randint(len(pool.scenes), (recipe.vision_batch,), generator=generator)
        loss, figures = heads.loss(patch_features(model, pool.pixels[rows]), {k: v[rows] for k, v in targets.items()})
        _step(loss, parameters, optimiser, schedule, recipe)
        if step % 250 == 0 or step + 1 == recipe.vision_steps:
            _log("vision", step, loss, figures)


def train_language(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pool: ImagePool, recipe: PretrainRecipe
) -> None:
    """Projector and language model on the mixture, over the frozen tower's features."""
    features = frozen_features(model, pool.pixels)
    packer = TurnPacker(processor.tokenizer, recipe.sizes.image_tokens)
    parameters = [*model.model.multi_modal_projector.parameters()]
    parameters += [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimiser, schedule = _optimiser(parameters, recipe.language_lr, recipe.language_steps, recipe)
    rng = Random(f"turns/{recipe.seed}")
    right: dict[str, list[float]] = {}
    for step in range(recipe.language_steps):
        rows = [rng.randrange(len(pool.scenes)) for _ in range(recipe.language_batch)]
        turns = [sample_turns(pool.scenes[row], rng, recipe.turns_per_image) for row in rows]
        batch = packer.pack(turns, recipe.tokens_per_row)
        loss, correct = packed_loss(model, features[rows], batch)
        _step(loss, parameters, optimiser, schedule, recipe)
        for row, share in zip(rows, correct, strict=True):
            right.setdefault(_kind(pool.scenes[row]), []).append(share)
        if step % 250 == 0 or step + 1 == recipe.language_steps:
            _log(
                "language",
                step,
                loss,
                {kind: float(np.mean(values)) for kind, values in sorted(right.items())},
            )
            right.clear()


def _kind(scene: Scene) -> str:
    if scene.blur:
        return "blurred"
    if scene.kind != "things":
        return scene.kind
    return "pair" if len({thing.shape for thing in scene.things}) == 2 else f"group{min(len(scene.things), 2)}"


@torch.no_grad()
def frozen_features(model: LlavaForConditionalGeneration, pixels: Tensor, batch: int = 512) -> Tensor:
    """patch_features of many images: [N, patches, vision hidden]."""
    return torch.cat([patch_features(model, part) for part in pixels.split(batch)])


def packed_loss(
    model: LlavaForConditionalGeneration, features: Tensor, batch: PackedBatch
) -> tuple[Tensor, list[float]]:
    """Mean cross-entropy over the answers' tokens, and each row's share of turns predicted without a slip.

    Args:
        features: [B, patches, vision hidden]; `batch` holds the B rows' packed turns.
    """
    projected = model.model.multi_modal_projector(features).flatten(0, 1)
    embedded = model.get_input_embeddings()(batch.input_ids)
    embedded = embedded.masked_scatter(batch.is_image[..., None], projected)
    hidden = model.model.language_model(
        inputs_embeds=embedded, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    where = batch.targets >= 0
    logits, targets = model.lm_head(hidden[where]), batch.targets[where]
    wrong = (logits.argmax(-1) != targets).float()
    slips = torch.zeros(where.shape[0], int(batch.turn_of.max()) + 1)
    slips.index_put_((where.nonzero()[:, 0], batch.turn_of[where]), wrong, accumulate=True)
    turns = batch.turn_of.amax(1)
    clean = (slips == 0).float().cumsum(1)[torch.arange(len(turns)), turns] - 1
    return nn.functional.cross_entropy(logits, targets), (clean / turns).tolist()


def _step(
    loss: Tensor,
    parameters: list[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    recipe: PretrainRecipe,
) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
    optimiser.step()
    schedule.step()


def _log(phase: str, step: int, loss: Tensor, figures: dict[str, float]) -> None:
    text = " ".join(f"{name} {value:.3f}" for name, value in figures.items())
    print(f"{time.strftime('%H:%M:%S')} {phase} {step} loss {loss.item():.4f} {text}", flush=True)


def build_base(out: Path, recipe: PretrainRecipe) -> dict[str, Any]:
    """Run the recipe; save model, processor and recipe.json under `out`; returns what recipe.json holds."""
    torch.manual_seed(recipe.seed)
    start = time.monotonic()
    model, processor = build_tiny(tokenizer_texts(recipe.seed), recipe.seed, recipe.sizes)
    pool = ImagePool.sample(recipe.images, recipe.seed)
    _log("pool", 0, torch.zeros(()), {"seconds": time.monotonic() - start})
    model.train()
    train_vision(model, pool, recipe)
    model.model.vision_tower.requires_grad_(False)
    train_language(model, processor, pool, recipe)
    model.eval().requires_grad_(True)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    record = {
        "recipe": asdict(recipe),
        "config_hash": recipe.digest(),
        "mixture_hash": mixture_hash(recipe),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(processor.tokenizer),
    }
    (out / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def main() -> None:
    """Command line: the output folder, and single values of the recipe as name=value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", help="name=value of PretrainRecipe")
    args = parser.parse_args()
    overrides = {name: json.loads(value) for name, value in (text.split("=", 1) for text in args.overrides)}
    build_base(args.out, PretrainRecipe(**overrides))


if __name__ == "__main__":
    main()
