"""What a sequence costs: FLOPs, a card's memory and rate, and what has to be downloaded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from clmoe.benchmarks.base import Benchmark
from clmoe.errors import ClmoeError
from clmoe.utils.names import unknown

GB = 10**9
MFU = 0.4  # of a card's rate, for hours


@dataclass(frozen=True)
class Card:
    """A GPU: bytes of memory as sold, and FLOPs per second of dense bf16 products, both on the maker's data sheet."""

    name: str
    memory: int
    rate: float


CARDS = tuple(
    Card(name, size * GB, rate)
    for name, size, rate in (
        ("RTX 4090", 24, 165e12),
        ("RTX 3090", 24, 71e12),
        ("L40S", 48, 362e12),
        ("L4", 24, 121e12),
        ("A100", 80, 312e12),
        ("A10", 24, 125e12),
        ("H100 PCIe", 80, 756e12),
        ("H100", 80, 989e12),
        ("H200", 141, 989e12),
        ("B200", 180, 2250e12),
    )
)
"""Of one size the first stands for it; of names that begin alike the longest comes first."""


def card(text: str) -> Card:
    """A card by its name, or by its memory, as in ``24GB``: the rate is then the first's in ``CARDS`` that has as much.

    Raises ClmoeError for neither.
    """
    by_name = {known.name.lower().replace(" ", ""): known for known in CARDS}
    name = re.sub(r"[\s_-]", "", text.lower())
    if name in by_name:
        return by_name[name]
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(gi?b?)", name)
    if size is None or float(size[1]) == 0:
        raise ClmoeError(f"{text!r}: write a memory, as in 24GB or 22.5GiB; {unknown('card', text, by_name)}")
    memory = int(float(size[1]) * (2**30 if size[2].startswith("gi") else GB))
    like = next((known for known in CARDS if known.memory >= 0.9 * memory), CARDS[-1])  # GiB, or what drivers report
    return Card(f"{text} (rate of {like.name})", memory, like.rate)


def step_flops(
    config: Any, samples: int, tokens: int, answers: int, adapter: int, tuned: bool, recompute: bool = False
) -> int:
    """Multiplications and additions of a LLaVA's training step, forward and backward, with or without recomputation.

    Each of ``samples`` has an image and ``tokens``; ``answers`` tokens in all reach the head. The ``adapter`` has so
    many parameters, each used for every token; ``tuned``: the projector trains. Frozen linears have no weight gradient.
    Causal attention counts the half of its square that is not masked.
    """
    W, P, D, N = config.vision_config.hidden_size, config.image_seq_length, _text(config).hidden_size, samples * tokens
    blocks, attention, head, tower = _forward(config, samples, tokens, answers)
    projector = 2 * samples * P * ((2 * W * D + 3 * D * D) if tuned else (W * D + D * D))
    again = blocks + attention + 2 * N * adapter if recompute else 0
    return 2 * (blocks + head) + 3 * attention + 3 * 2 * N * adapter + tower + projector + again


def answer_flops(config: Any, tokens: int, adapter: int) -> int:
    """Of reading one question of so many tokens, with its image, and its answer's first token."""
    W, P, D = config.vision_config.hidden_size, config.image_seq_length, _text(config).hidden_size
    return sum(_forward(config, 1, tokens, 1)) + 2 * tokens * adapter + 2 * P * (W * D + D * D)


def _text(config: Any) -> Any:
    return config.get_text_config()


def _forward(config: Any, samples: int, tokens: int, answers: int) -> tuple[int, int, int, int]:
    """Of a forward pass: linears of the blocks, causal attention, head, vision tower."""
    text, vision, P = _text(config), config.vision_config, config.image_seq_length
    D, L, W = text.hidden_size, text.num_hidden_layers, vision.hidden_size
    blocks = 2 * samples * tokens * L * (4 * D * D + 3 * D * text.intermediate_size)
    tower = 2 * (P + 1) * (4 * W * W + 2 * W * vision.intermediate_size) + 4 * (P + 1) ** 2 * W
    tower = samples * (tower * vision.num_hidden_layers + 2 * P * W * 3 * vision.patch_size**2)
    return blocks, 2 * samples * tokens**2 * D * L, 2 * answers * text.vocab_size * D, tower


def answers_asked(questions: Sequence[int | None], limit: int | None, union: bool) -> int | None:
    """Of a sequence's whole matrix: all learned tasks after each, ``limit`` of each in all rows but the last."""
    if None in questions:
        return None
    whole = [number for number in questions if number is not None]
    part = [min(number, limit or number) for number in whole]
    rows = [] if union else [sum(part[:row]) for row in range(1, len(part))]
    return sum(rows) + sum(whole)


def downloads(benchmark: Benchmark, model: str, parameters: int | None) -> list[str]:
    """Commands that fetch a base from the hub, which has so many 16-bit ``parameters``, and data that is not there."""
    lines = []
    if parameters is not None:
        lines.append(f"hf download {model}  # {2 * parameters / GB:.1f} GB")
    for place, source in benchmark.sources.items():
        there = benchmark.root / place
        if not there.exists():
            lines.append(_command(there.relative_to(Path.cwd()) if there.is_relative_to(Path.cwd()) else there, source))
    return lines


def _command(place: Path, source: str) -> str:
    """One line for a shell; a comment where a person has to choose."""
    url, _, note = source.partition(" ")
    url = url.rstrip(";")
    data_set = re.fullmatch(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)", url)
    note = f"  # {note}" if note else ""
    if data_set is not None:
        return f"hf download {data_set[1]} --repo-type dataset --local-dir {place}{note}"
    name = PurePosixPath(url).name
    if not url.startswith("http") or PurePosixPath(name).suffix not in (".zip", ".json"):
        return f"# {place}: {source}"
    inner = place.suffix or place.name == PurePosixPath(name).stem  # the archive holds the folder itself
    folder = place.parent if inner else place
    unpack = f" && unzip -d {folder} {folder / name}" if name.endswith(".zip") else ""
    return f"curl -L --create-dirs --output-dir {folder} -O {url}{unpack}{note}"
