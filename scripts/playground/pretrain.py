"""Pre-train the base of the embedded benchmark: first the vision tower alone, then projector and language model.

    python scripts/playground/pretrain.py OUT

OUT becomes a folder that `from_pretrained` reads, with the recipe in recipe.json. Everything is drawn from one seed: on
one thread (OMP_NUM_THREADS=1) of one machine, the weights repeat bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
from tiny import TinySizes, build_tiny
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from clmoe.data.prompts import SYSTEM, Encoded, encode_training
from clmoe.data.records import TrainRecord, Turn
from clmoe.embedded import scenes
from clmoe.embedded.scenes import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, SIDE, WORDS, Scene, digit_value, draw, render
from clmoe.embedded.tasks import CL4VQA_TASKS, COIN_TASKS, sample_scene, sample_turns
from clmoe.utils.files import json_sha256

IGNORE = -100


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


# ---- the data ----


def sample_images(count: int, seed: int) -> tuple[list[Scene], Tensor]:
    """Scenes of the mixture, and their pixels [N, 3, 56, 56] uint8."""
    rng = Random(f"pool/{seed}")
    sampled = [sample_scene(rng) for _ in range(count)]
    pixels = np.stack([np.asarray(render(scene)) for scene in sampled]).transpose(0, 3, 1, 2)
    return sampled, torch.from_numpy(np.ascontiguousarray(pixels))


def every_answer_word() -> tuple[str, ...]:
    """All words that occur in an answer of either benchmark, in a fixed order and without repeats."""
    shapes, colours = SHAPES.values(), COLOURS.values()
    groups = (
        COLOURS, BACKGROUNDS, SHAPES, PATTERNS, WORDS, scenes.COUNT_WORDS, scenes.DIGIT_WORDS,
        ("left", "right", "top", "bottom"), scenes.LETTERS,
        [shape.object for shape in shapes], PATTERNS.values(),
        [colour.fruit for colour in colours], [colour.gem for colour in colours],
        [shape.action for shape in shapes], [shape.type for shape in shapes],
        [background.cause for background in BACKGROUNDS.values()],
        ("above", "below", "middle", "yes", "no", "unanswerable"),
    )  # fmt: skip
    return tuple(dict.fromkeys(word for group in groups for word in group))


def tokenizer_texts(seed: int) -> Iterator[str]:
    """The template, the mixture, and the words of all tasks: what the tokenizer must know as whole words."""
    rng = Random(f"tokenizer/{seed}")
    yield f"{SYSTEM} USER: \nASSISTANT: USER: ASSISTANT:"
    for word in every_answer_word():
        yield f" {word}"
    for _ in range(4_000):
        for turn in sample_turns(sample_scene(rng), rng, 4):
            yield f"\n{turn.question} ASSISTANT: {turn.answer}"
    for task in COIN_TASKS + CL4VQA_TASKS:
        for _ in range(200):
            for turn in task.turns(draw(rng.choice(task.samplers), "train", rng, task.backgrounds), rng):
                yield f"\n{turn.question} ASSISTANT: {turn.answer}"


def mixture_hash(recipe: PretrainRecipe) -> str:
    """Hash of what the recipe's values do not say: the words that the tokenizer sees, and the first images."""
    digest = hashlib.sha256()
    for text in tokenizer_texts(recipe.seed):
        digest.update(text.encode())
    digest.update(sample_images(min(recipe.images, 256), recipe.seed)[1].numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- vision: labels read off the scenes, and small heads for them ----

CONTENTS = (
    *WORDS, *(f"digit {value}" for value in range(10)), *PATTERNS, *(f"{n} things" for n in range(1, 6)), "blur",
)  # fmt: skip
INKS = (*COLOURS, "several", "none")
PATCH_KINDS = ("nothing", *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))
GRID = 4  # patches per side
PATCH = SIDE / GRID
BOX_WEIGHT, POSITION_WEIGHT = 4.0, 0.3


def vision_targets(labelled: Sequence[Scene]) -> dict[str, Tensor]:
    """Labels of N scenes.

    Returns:
        `content`, `ink`, `background` [N] and `kind`, the patches' kinds [N, 16], int64; `box` [N, 16, 4], the box of
        the thing that covers a patch (fractions of the side; NaN where there is none).
    """
    kinds, boxes = zip(*(_patch_labels(scene) for scene in labelled), strict=True)
    return {
        "content": torch.tensor([CONTENTS.index(_content(scene)) for scene in labelled]),
        "ink": torch.tensor([INKS.index(_ink(scene)) for scene in labelled]),
        "background": torch.tensor([scenes.EVERY_BACKGROUND.index(scene.background) for scene in labelled]),
        "kind": torch.tensor(kinds),
        "box": torch.tensor(boxes),
    }


def _content(scene: Scene) -> str:
    if scene.blur:
        return "blur"
    if scene.lettering:
        return scene.lettering.word
    if scene.handwriting:
        return f"digit {digit_value(scene.handwriting.source)}"
    return scene.pattern.name if scene.pattern else f"{len(scene.things)} things"


def _ink(scene: Scene) -> str:
    colours = {part.colour for part in (*scene.things, scene.lettering, scene.pattern) if part}
    return "several" if len(colours) > 1 else colours.pop() if colours else "none"


def _patch_labels(scene: Scene) -> tuple[list[int], list[list[float]]]:
    """Per patch, the thing that covers most of it (at least a fifth); blurred scenes have none."""
    kinds, boxes = [], []
    for patch in range(GRID * GRID):
        left, top = (patch % GRID) * PATCH, (patch // GRID) * PATCH
        best, cover = None, 0.2 * PATCH * PATCH
        for thing in () if scene.blur else scene.things:
            x1, y1, x2, y2 = (edge * SIDE for edge in thing.box)
            width = min(x2, left + PATCH) - max(x1, left)
            height = min(y2, top + PATCH) - max(y1, top)
            if width > 0 and height > 0 and width * height > cover:
                best, cover = thing, width * height
        kinds.append(PATCH_KINDS.index(f"{best.colour} {best.shape}") if best else IGNORE if scene.blur else 0)
        boxes.append(list(best.box) if best else [float("nan")] * 4)
    return kinds, boxes


class VisionHeads(nn.Module):
    """Linear read-outs of the patch features, thrown away after the tower's training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.content = nn.Linear(width, len(CONTENTS))
        self.ink = nn.Linear(width, len(INKS))
        self.background = nn.Linear(width, len(BACKGROUNDS))
        self.kind = nn.Linear(width, len(PATCH_KINDS))
        self.box = nn.Linear(width, 4)
        self.position = nn.Linear(width, GRID * GRID)

    def loss(self, patches: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Sum of the losses, and accuracies; `patches` [B, 16, width], `targets` as of `vision_targets`."""
        pooled = patches.mean(1)
        total = patches.new_zeros(())
        figures = {}
        for name in ("content", "ink", "background"):
            logits = getattr(self, name)(pooled)
            total = total + functional.cross_entropy(logits, targets[name])
            figures[name] = (logits.argmax(-1) == targets[name]).float().mean().item()
        kinds, wanted = self.kind(patches).flatten(0, 1), targets["kind"].flatten()
        total = total + functional.cross_entropy(kinds, wanted, ignore_index=IGNORE)
        seen = wanted > 0
        figures["kind"] = (kinds.argmax(-1) == wanted)[seen].float().mean().item()
        covered = ~targets["box"].isnan().any(-1)
        error = functional.l1_loss(self.box(patches)[covered], targets["box"][covered])
        figures["box"] = error.item()
        own = torch.arange(GRID * GRID).expand(patches.shape[0], -1)
        place = functional.cross_entropy(self.position(patches).flatten(0, 1), own.flatten())
        return total + BOX_WEIGHT * error + POSITION_WEIGHT * place, figures


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to the float32 that the processor makes: -1..1."""
    return pixels.float() / 127.5 - 1.0


def patch_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the projector receives: [B, patches, vision hidden], of the layer before the last, no CLS."""
    return model.model.vision_tower(normalise(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]


@torch.no_grad()
def frozen_features(model: LlavaForConditionalGeneration, pixels: Tensor, batch: int = 512) -> Tensor:
    """patch_features of many images: [N, patches, vision hidden]."""
    return torch.cat([patch_features(model, part) for part in pixels.split(batch)])


# ---- language: several independent questions about one image in one sequence ----


@dataclass(frozen=True)
class PackedBatch:
    """B rows of T tokens.

    The system sentence and the image are computed once. Each turn sees them and itself, at the positions it would have
    as the only turn, so every answer has to come from the image.

    Attributes:
        input_ids, positions: [B, T] int64.
        targets: [B, T] int64, the *next* token where an answer is to be predicted, else -100.
        turn_of: [B, T] int64, 0 in the shared beginning and in padding, 1.. in the turns.
        is_image: [B, T] bool.
        mask: [B, 1, T, T] bool, true where a token may be seen.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    turn_of: Tensor
    is_image: Tensor
    mask: Tensor


class TurnPacker:
    """Packs rows of turns; encodes them through the library's own conversation template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_tokens: int) -> None:
        self.tokenizer, self.image_tokens = tokenizer, image_tokens
        self._cache: dict[Turn, Encoded] = {}
        ids, _ = self._encode(Turn("?", "-"))
        self._start = len(ids) - ids[::-1].index(tokenizer.image_token_id)  # tokens up to the image, in every turn

    def _encode(self, turn: Turn) -> Encoded:
        if turn not in self._cache:
            record = TrainRecord("mixture", "in memory", (turn,))
            self._cache[turn] = encode_training(record, self.tokenizer, self.image_tokens, 1024)
        return self._cache[turn]

    def pack(self, rows: Sequence[Sequence[Turn]], budget: int) -> PackedBatch:
        """One row per image: its turns in order, as many (one at least) as `budget` tokens hold."""
        packed = [self._pack_row(turns, budget) for turns in rows]
        longest = max(len(row[0]) for row in packed)
        pads = (self.tokenizer.pad_token_id, 0, IGNORE, -1)
        input_ids, positions, targets, turn_of = (
            torch.tensor([row[part] + [pads[part]] * (longest - len(row[part])) for row in packed]) for part in range(4)
        )
        order = torch.arange(longest)
        causal = order[:, None] >= order[None, :]
        seen = (turn_of[:, None, :] == 0) | (turn_of[:, None, :] == turn_of[:, :, None])
        is_image = input_ids == self.tokenizer.image_token_id
        return PackedBatch(input_ids, positions, targets, turn_of.clamp(min=0), is_image, (seen & causal)[:, None])

    def _pack_row(self, turns: Sequence[Turn], budget: int) -> tuple[list[int], list[int], list[int], list[int]]:
        start = self._start
        ids = list(self._encode(turns[0]).input_ids[:start])
        positions, targets, turn_of = list(range(start)), [IGNORE] * start, [0] * start
        for number, turn in enumerate(turns, 1):
            turn_ids, labels = self._encode(turn)
            length = len(turn_ids) - start
            if number > 1 and len(ids) + length > budget:
                break
            ids += turn_ids[start:]
            positions += range(start, start + length)
            targets += [*labels[start + 1 :], IGNORE]
            turn_of += [number] * length
        return ids, positions, targets, turn_of


def packed_loss(
    model: LlavaForConditionalGeneration, features: Tensor, batch: PackedBatch
) -> tuple[Tensor, list[float]]:
    """Mean cross-entropy over the answers' tokens, and each row's share of turns predicted without an error.

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
    return functional.cross_entropy(logits, targets), (clean / turns).tolist()


# ---- training ----


class Stepper:
    """AdamW with warm-up, cosine and clipping, and its log."""

    def __init__(self, phase: str, parameters: list[nn.Parameter], lr: float, steps: int, recipe: PretrainRecipe):
        self.phase, self.parameters, self.steps, self.clip_norm = phase, parameters, steps, recipe.clip_norm
        self.optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.98))

        def scale(step: int) -> float:
            warm = min(1.0, (step + 1) / recipe.warmup_steps)
            return warm * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, scale)

    def step(self, loss: Tensor) -> None:
        """Update the parameters."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimiser.step()
        self.schedule.step()

    def log(self, step: int, loss: Tensor, figures: dict[str, list[float]]) -> None:
        """Every 250 steps, and at the end, print the figures' means since the last time and empty the lists."""
        if step % 250 and step + 1 < self.steps:
            return
        text = " ".join(f"{name} {np.mean(values):.3f}" for name, values in sorted(figures.items()))
        figures.clear()
        print(f"{time.strftime('%H:%M:%S')} {self.phase} {step} loss {loss.item():.4f} {text}", flush=True)


def train_vision(
    model: LlavaForConditionalGeneration, labelled: list[Scene], pixels: Tensor, recipe: PretrainRecipe
) -> None:
    """Supervised stand-in for CLIP's pre-training: what, where, which colour, per image and per patch."""
    heads = VisionHeads(recipe.sizes.vision_hidden)
    parameters = [*model.model.vision_tower.parameters(), *heads.parameters()]
    stepper = Stepper("vision", parameters, recipe.vision_lr, recipe.vision_steps, recipe)
    targets = vision_targets(labelled)
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.vision_steps):
        rows = torch.randint(len(labelled), (recipe.vision_batch,), generator=generator)
        loss, figures = heads.loss(patch_features(model, pixels[rows]), {k: v[rows] for k, v in targets.items()})
        stepper.step(loss)
        stepper.log(step, loss, {name: [value] for name, value in figures.items()})


def train_language(
    model: LlavaForConditionalGeneration, packer: TurnPacker, shown: list[Scene], pixels: Tensor, recipe: PretrainRecipe
) -> None:
    """Projector and language model on the mixture, over the frozen tower's features."""
    features = frozen_features(model, pixels)
    parts = (model.model.multi_modal_projector, model.model.language_model, model.lm_head)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    stepper = Stepper("language", parameters, recipe.language_lr, recipe.language_steps, recipe)
    rng = Random(f"turns/{recipe.seed}")
    right: dict[str, list[float]] = {}
    for step in range(recipe.language_steps):
        rows = [rng.randrange(len(shown)) for _ in range(recipe.language_batch)]
        turns = [sample_turns(shown[row], rng, recipe.turns_per_image) for row in rows]
        loss, clean = packed_loss(model, features[rows], packer.pack(turns, recipe.tokens_per_row))
        stepper.step(loss)
        for row, share in zip(rows, clean, strict=True):
            right.setdefault("blurred" if shown[row].blur else shown[row].kind, []).append(share)
        stepper.log(step, loss, right)


def build_base(out: Path, recipe: PretrainRecipe) -> None:
    """Run the recipe; save model, processor and recipe.json under `out`."""
    torch.manual_seed(recipe.seed)
    model, processor = build_tiny(tokenizer_texts(recipe.seed), recipe.seed, recipe.sizes)
    sampled, pixels = sample_images(recipe.images, recipe.seed)
    model.train()
    train_vision(model, sampled, pixels, recipe)
    model.model.vision_tower.requires_grad_(False)
    packer = TurnPacker(processor.tokenizer, recipe.sizes.image_tokens)
    train_language(model, packer, sampled, pixels, recipe)
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    build_base(parser.parse_args().out, PretrainRecipe())


if __name__ == "__main__":
    main()
