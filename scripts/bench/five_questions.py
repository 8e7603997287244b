"""What the benches of evaluation, location and training share: bases of two sizes, and questions five to an image."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image, ImageDraw
from torch import nn

from clmoe.config import Config, ModelConfig, load_config
from clmoe.data.prompts import SYSTEM
from clmoe.data.records import Question, TrainRecord, Turn
from clmoe.methods.base import Method, method_class
from clmoe.model.adapter import attach_adapter
from clmoe.model.llava import LoadedBase, load_base
from clmoe.model.tiny import TinySizes, build_tiny

COLOURS = ("red", "green", "blue", "yellow", "purple")
QUESTIONS = (
    "What is the colour of the thing at the left?",
    "How many things are there?\nAnswer the question using a single word or phrase.",
    "Is there a circle in the picture?\nAnswer yes or no.",
    "Which shape is the largest one, and is it above the small one?",
    "On which side is the triangle, left or right?",
)
# 576 image tokens of some 630, as in LLaVA-1.5
LLAVA_LIKE = TinySizes(image_size=336, vision_layers=2, text_layers=4, positions=1024)


def open_base(kind: str) -> LoadedBase:
    """``playground``: the embedded benchmark's base, 16 image tokens; ``llava``: random weights, 576 image tokens."""
    if kind == "playground":
        return load_base(ModelConfig())
    with tempfile.TemporaryDirectory() as folder:
        model, processor = build_tiny([SYSTEM, *QUESTIONS, *COLOURS], 0, LLAVA_LIKE, vocabulary=800)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return load_base(ModelConfig(path=folder))


def adapted(base: LoadedBase, method: str = "moelora") -> tuple[PeftModel, Method]:
    """An adapter of eight experts whose up-projections are not zero."""
    config: Config = load_config(method, {"adapter": {"rank": 64, "experts": 8}}, [])
    kind = method_class(method)(config)
    model = attach_adapter(base.model, kind.adapter(base))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.01, generator=generator)
    return model, kind


def write_images(folder: Path, count: int, side: int) -> list[str]:
    """Pictures of coloured shapes; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for number in range(count):
        image = Image.new("RGB", (side, side), (240, 240, 240))
        pen = ImageDraw.Draw(image)
        for _ in range(draw.randint(1, 4)):
            x, y, size = (draw.randint(0, side * 3 // 4) for _ in range(3))
            shape = draw.choice((pen.ellipse, pen.rectangle))
            shape((x, y, x + size // 2 + 2, y + size // 2 + 2), fill=draw.choice(COLOURS))
        image.save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


def questions(names: list[str]) -> list[Question]:
    """Five of each image."""
    return [Question(f"{name}-{k}", name, text, "", {}) for name in names for k, text in enumerate(QUESTIONS)]


def records(names: list[str]) -> list[TrainRecord]:
    """Five of each image, with short answers."""
    draw = random.Random(1)
    return [
        TrainRecord(f"{name}-{k}", name, (Turn(text, draw.choice(COLOURS)),))
        for name in names
        for k, text in enumerate(QUESTIONS)
    ]


def figures(
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]], args: argparse.Namespace
) -> dict[str, Any] | None:
    """What ``measure`` finds on one thread, in a folder that is removed; with ``--json`` printed, and None returned."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    if not args.json:
        return found
    print(json.dumps(found))
    return None


class Peak:
    """Peak resident memory in MiB since it was made (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def mib(self) -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
