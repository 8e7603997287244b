"""What a sequence costs: FLOPs, a card's memory and rate, and what has to be downloaded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import cast

from clmoe.benchmarks.base import Benchmark, Task
from clmoe.errors import ClmoeError
from clmoe.methods.base import Method
from clmoe.plan.shapes import ImageSize, Shapes
from clmoe.utils.names import unknown

GB = 10**9
MFU = 0.4  # share of a card's rate, for hours


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
"""The first card of a size stands for it; of names that begin alike, the longest comes first."""


def card(text: str) -> Card:
    """A card by its name, or by its memory as in ``24GB``, with the rate of the first in ``CARDS`` that has as much.

    Raises ClmoeError if it is neither.
    """
    by_name = {known.name.lower().replace(" ", ""): known for known in CARDS}
    name = re.sub(r"[\s_-]", "", text.lower())
    if name in by_name:
        return by_name[name]
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(gi?b?)", name)
    if size is None or float(size[1]) == 0:
        raise ClmoeError(f"{text!r}: write a memory size, as in 24GB or 22.5GiB; {unknown('card', text, by_name)}")
    memory = int(float(size[1]) * (2**30 if size[2].startswith("gi") else GB))
    like = next((known for known in CARDS if known.memory >= 0.9 * memory), CARDS[-1])  # GiB, or what drivers report
    return Card(f"{text} (rate of {like.name})", memory, like.rate)


def step_flops(
    shapes: Shapes,
    image: ImageSize,
    samples: int,
    tokens: int,
    answers: int,
    adapter: int,
    tuned: bool,
    recompute: bool = False,
) -> int:
    """Multiplications and additions of a training step, forward and backward, with or without recomputation.

    Each of ``samples`` has an image and ``tokens``; ``answers`` tokens in all reach the head. ``adapter``: its number
    of parameters, each used for every token; ``tuned``: the projector trains. Frozen linears have no weight gradient.
    Causal attention counts the half of its square that is not masked; attention windows are ignored.
    """
    blocks, attention, head, tower = _forward(shapes, image, samples, tokens, answers)
    again = blocks + attention + 2 * samples * tokens * adapter if recompute else 0
    projector = samples * _projector(shapes, image, tuned)
    return 2 * (blocks + head) + 3 * attention + 3 * 2 * samples * tokens * adapter + tower + projector + again


def answer_flops(shapes: Shapes, image: ImageSize, tokens: int, adapter: int) -> int:
    """FLOPs of reading one question of this many tokens, with its image, and its answer's first token."""
    return sum(_forward(shapes, image, 1, tokens, 1)) + 2 * tokens * adapter + _projector(shapes, image, False)


def _projector(shapes: Shapes, image: ImageSize, tuned: bool) -> int:
    """FLOPs for one image; the first matrix of each part passes no gradient on."""
    total = 0
    for part in shapes.projector:
        first = part.matrices[0][0] * part.matrices[0][1]
        total += 2 * (image.patches // part.merged) * (3 * part.weights - first if tuned else part.weights)
    return total


def _forward(s: Shapes, image: ImageSize, samples: int, tokens: int, answers: int) -> tuple[int, int, int, int]:
    """FLOPs of a forward pass: linears of the blocks, causal attention, head, vision tower."""
    rows = image.patches // image.tiles + 1  # with a class token
    tower = image.tiles * (2 * rows * s.tower_linears + 4 * rows**2 * s.tower * s.tower_blocks)
    tower = samples * (tower + 2 * image.patches * s.patching)
    return 2 * samples * tokens * s.linears, 2 * samples * tokens**2 * s.queries * s.L, 2 * answers * s.V * s.D, tower


Asked = tuple[int, int]
"""Questions of a test file: all, and those of a sample."""


def answers_asked(tasks: Sequence[Asked], general: Sequence[Asked] | None = None) -> int:
    """Questions of a sequence's whole matrix: all learned tasks after each, only a sample in all rows but the last.

    With ``general`` sets, also what ``evaluation.general`` asks: everything for the bare base, the sets in each row,
    and the next task in each row but the last.
    """
    whole, part = (sum(pair[k] for pair in [*tasks, *(general or ())]) for k in (0, 1))
    besides, ahead = part - sum(pair[1] for pair in tasks), general is not None
    rows = [sum(pair[1] for pair in tasks[: row + ahead]) + besides for row in range(1, len(tasks))]
    return sum(rows) + (1 + ahead) * whole


def questions_asked(
    method: Method, tasks: Sequence[Task], sets: Sequence[Task], tests: dict[str, int | None]
) -> int | None:
    """Questions of a sequence's whole matrix, from those of each test file; None if one is missing."""
    if None in tests.values():
        return None
    limit, counts = method.config.evaluation.limit, cast(dict[str, int], tests)
    pairs = [
        [(counts[t.name], min(counts[t.name], t.sample(limit) or counts[t.name])) for t in x] for x in (tasks, sets)
    ]
    learned, general = pairs
    if method.chain == "union":
        learned = [(sum(whole for whole, _ in learned), sum(part for _, part in learned))]
    if not method.config.evaluation.general:
        return answers_asked(learned)
    if method.keeps_parts and method.config.locator.name == "oracle":  # it has no answer for tasks that are not learned
        return answers_asked(learned) + sum(whole for whole, _ in [*learned, *general])
    return answers_asked(learned, general)


def downloads(benchmark: Benchmark, model: str, parameters: int | None) -> list[str]:
    """Commands that fetch a base with this many 16-bit ``parameters`` from the hub, and data that is missing."""
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
