"""What the vision tower learns before it is frozen: labels read off the scenes, and small heads for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from clmoe.benchmarks.playground.lexicon import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, WORDS
from clmoe.benchmarks.playground.scenes import SIDE, Scene, digit_value

CONTENTS = (
    *WORDS,
    *(f"digit {value}" for value in range(10)),
    *PATTERNS,
    *(f"{n} things" for n in range(1, 6)),
    "blur",
)
INKS = (*COLOURS, "several", "none")
PATCH_KINDS = ("nothing", *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))
GRID = 4  # patches per side
PATCH = SIDE / GRID
IGNORE = -100
BOX_WEIGHT, POSITION_WEIGHT = 4.0, 0.3


def vision_targets(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Labels of N scenes: content, ink, background [N] and patch kind [N, 16] int64, and the box of the thing
    that covers the patch [N, 16, 4] (shares of the side; NaN where there is none)."""
    kinds, boxes = zip(*(_patch_labels(scene) for scene in scenes), strict=True)
    return {
        "content": torch.tensor([CONTENTS.index(_content(scene)) for scene in scenes]),
        "ink": torch.tensor([INKS.index(_ink(scene)) for scene in scenes]),
        "background": torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes]),
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
    source = scene.lettering or scene.pattern
    colours = {source.colour} if source else {thing.colour for thing in scene.things}
    if not colours:
        return "none"
    return colours.pop() if len(colours) == 1 else "several"


def _patch_labels(scene: Scene) -> tuple[list[int], list[list[float]]]:
    """Per patch, the thing that covers most of it (a fifth at least); blurred scenes have none."""
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
    """Linear read-outs of the patch features; thrown away after the tower's training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.content = nn.Linear(width, len(CONTENTS))
        self.ink = nn.Linear(width, len(INKS))
        self.background = nn.Linear(width, len(BACKGROUNDS))
        self.kind = nn.Linear(width, len(PATCH_KINDS))
        self.box = nn.Linear(width, 4)
        self.position = nn.Linear(width, GRID * GRID)

    def loss(self, patches: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Sum of the heads' losses, and their accuracies on the batch.

        Args:
            patches: [B, 16, width]; targets: rows of `vision_targets`.
        """
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
