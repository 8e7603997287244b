"""What the benches of evaluation, location and training share: bases of two sizes, and five questions per image."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clock import DEVICE
from peft import PeftModel
from PIL import Image, ImageDraw
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from clmoe.bases.llava import LoadedBase, count_image_tokens, load_base, shapes_file
from clmoe.config import Config, ModelConfig, load_config
from clmoe.data.prompts import SYSTEM
from clmoe.data.records import Question, TrainRecord, Turn
from clmoe.experts.model import attach_adapter
from clmoe.methods import method_class
from clmoe.methods.base import Method
from clmoe.utils.files import read_json

sys.path.append(str(Path(__file__).resolve().parents[1] / "playground"))
from tiny import TinySizes, build_tiny

COLOURS = ("red", "green", "blue", "yellow", "purple")
QUESTIONS = (
    "What is the colour of the thing at the left?",
    "How many things are there?\nAnswer the question using a single word or phrase.",
    "Is there a circle in the picture?\nAnswer yes or no.",
    "Which shape is the largest one, and is it above the small one?",
    "On which side is the triangle, left or right?",
)
BASES = ("playground", "llava", "llava-7b")
# 576 image tokens of some 630, as in LLaVA-1.5
LLAVA_LIKE = TinySizes(image_size=336, vision_layers=2, text_layers=4, positions=1024)
TRUE_SIZE = load_config("lora", {}, [], "llava-1.5-7b").model


def open_base(kind: str) -> LoadedBase:
    """``playground``: the embedded benchmark's base, 16 image tokens; ``llava``: random weights, 576 image tokens.

    ``llava-7b``: random weights in LLaVA-1.5-7B's shapes, bfloat16, for a GPU. It is on the GPU if there is one.
    """
    if kind == "playground":
        return load_base(ModelConfig(), DEVICE)
    if kind == "llava-7b":
        return random_base(read_json(shapes_file(TRUE_SIZE)))
    with DEVICE:
        model, processor = build_tiny([SYSTEM, *QUESTIONS, *COLOURS], 0, LLAVA_LIKE, vocabulary=800)
    model.requires_grad_(False)
    return _with_processor(model, processor, kind)


def random_base(shapes: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> LoadedBase:
    """Random weights in the shapes of a config.json, made on the device in ``dtype``; a tokenizer of 800 words."""
    side = TinySizes(image_size=shapes["vision_config"]["image_size"], text_layers=1, vision_layers=1)
    _, processor = build_tiny([SYSTEM, *QUESTIONS, *COLOURS], 0, side, vocabulary=800)
    config = LlavaConfig.from_dict(shapes | {"image_token_index": processor.tokenizer.image_token_id})
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            model = LlavaForConditionalGeneration(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)
    return _with_processor(model, processor, "random")


def _with_processor(model: LlavaForConditionalGeneration, processor: LlavaProcessor, fingerprint: str) -> LoadedBase:
    return LoadedBase(
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        image_token_count=count_image_tokens(model),
        fingerprint=fingerprint,
    )


def adapted(base: LoadedBase, config: Config | None = None) -> tuple[PeftModel, Method]:
    """An adapter whose up-projections are not zero; MoELoRA's with eight experts unless ``config`` says otherwise."""
    config = config or load_config("moelora", {"adapter": {"rank": 64, "experts": 8}}, [])
    kind = method_class(config.method)(config)
    model = attach_adapter(base.model, kind.adapter(base))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.01
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
    """Five for each image."""
    return [Question(f"{name}-{k}", name, text, "", {}) for name in names for k, text in enumerate(QUESTIONS)]


def records(names: list[str]) -> list[TrainRecord]:
    """Five for each image, with short answers."""
    draw = random.Random(1)
    return [
        TrainRecord(f"{name}-{k}", name, (Turn(text, draw.choice(COLOURS)),))
        for name in names
        for k, text in enumerate(QUESTIONS)
    ]


def figures(
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]], args: argparse.Namespace
) -> dict[str, Any] | None:
    """What ``measure`` finds on one thread, in a folder that is removed; ``--json`` prints it and returns None."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    if not args.json:
        return found
    print(json.dumps(found))
    return None
