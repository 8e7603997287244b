"""Sizes of a base that decide memory and FLOPs, and what an image takes in it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any, cast

import PIL.Image
from torch import nn

from clmoe.bases.chat import PROBE
from clmoe.bases.families import MASKED
from clmoe.bases.llava import LoadedBase, decoder_layers, open_encoder, projector_names
from clmoe.benchmarks.base import Task
from clmoe.config import ModelConfig
from clmoe.data.images import size_of
from clmoe.errors import ClmoeError
from clmoe.utils.files import read_json

SIZE = (640, 480)  # pixels of an image, if a benchmark has none to look at
LOOKED_AT = 16  # rows of each test file


@dataclass(frozen=True)
class Part:
    """A projector's module: matrices ``(in, out)`` in their order, norms, patches that become one row of the first.

    ``wide``: it computes in float32 on a base of any type.
    """

    matrices: list[tuple[int, int]]
    norms: int
    merged: int
    wide: bool

    @property
    def weights(self) -> int:
        return sum(din * dout for din, dout in self.matrices)


@dataclass(frozen=True)
class Shapes:
    """Sizes of a base.

    Attributes:
        D, F, L, V: hidden and FFN size, blocks and words of the decoder.
        queries, keys: heads x head size of the queries, and of the keys.
        norms: the widths of a block's norms, added up; of a head's norm over all heads.
        linears: weights of all blocks' linears.
        masked: training passes a mask, so that attention repeats the keys for every head.
        tower, tower_ffn, tower_blocks, tower_linears: the vision tower's hidden and FFN size, blocks, and weights.
        patching: weights of its first layer.
        tower_states: states of all patches that it holds at once.
        projector: its modules.
    """

    D: int
    F: int
    L: int
    V: int
    queries: int
    keys: int
    norms: int
    linears: int
    masked: bool
    tower: int
    tower_ffn: int
    tower_blocks: int
    tower_linears: int
    patching: int
    tower_states: int
    projector: list[Part]


@dataclass(frozen=True)
class ImageSize:
    """Tokens that an image adds to a prompt; patches and tiles that the tower reads; where the three come from."""

    tokens: int
    patches: int
    tiles: int
    source: str


def shapes_of(base: LoadedBase) -> Shapes:
    """The shapes of a base that no adapter has changed yet; it may be on the meta device."""
    model, config = base.model, base.model.config
    text, vision, blocks = config.get_text_config(), config.vision_config, decoder_layers(base.model)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    heads = {"q_norm": queries, "k_norm": keys}
    norms = [(name.rpartition(".")[2], module) for name, module in blocks[0].named_modules() if name.endswith("norm")]
    parts = [model.get_submodule(f"model.{name}") for name in projector_names(base)]
    inside = {id(module) for part in parts for module in part.modules()}
    tower = [m for m in model.get_submodule(f"model.{base.family.vision}").modules() if id(m) not in inside]
    patching = next(m for m in tower if isinstance(m, nn.Conv2d | nn.Conv3d))
    depth, read = getattr(vision, "depth", None) or vision.num_hidden_layers, _layers_read(config)
    return Shapes(
        D=text.hidden_size,
        F=text.intermediate_size,
        L=text.num_hidden_layers,
        V=text.vocab_size,
        queries=queries,
        keys=keys,
        norms=sum(heads.get(name, norm.weight.numel()) for name, norm in norms),
        linears=sum(linear.weight.numel() for linear in _linears(blocks.modules())),
        masked=bool(MASKED & set(base.family.inputs)),
        tower=patching.out_channels,
        tower_ffn=max(linear.out_features for linear in _linears(tower)),
        tower_blocks=depth,
        tower_linears=sum(linear.weight.numel() for linear in _linears(tower)),
        patching=patching.weight.numel(),
        tower_states=depth + 1 if read else 1,
        projector=[_part(part, patching.out_channels * max(read, 1)) for part in parts],
    )


def _linears(modules: Any) -> Iterator[nn.Linear]:
    return (module for module in modules if isinstance(module, nn.Linear))


def _layers_read(config: Any) -> int:
    """Number of the tower's layers whose states the projector reads; 0 if it reads the tower's output."""
    layers = getattr(config, "vision_feature_layer", None)
    return len(layers) if isinstance(layers, Sequence) else int(layers not in (None, -1))


def _part(part: nn.Module, width: int) -> Part:
    linears = [(linear.in_features, linear.out_features) for linear in _linears(part.modules())]
    bare = [(p.shape[0], p.shape[1]) for p in part.parameters(recurse=False) if p.dim() == 2]
    norms = [m for m in part.modules() if not isinstance(m, nn.Linear) and getattr(m, "weight", None) is not None]
    pools = [cast(int, m.kernel_size) ** 2 for m in part.modules() if isinstance(m, nn.AvgPool2d)]
    merged = (bare or linears)[0][0] // width
    return Part(bare + linears, len(norms), merged * prod(pools), bool(bare or norms))


def image_size(config: ModelConfig, base: LoadedBase, tasks: Sequence[Task] = ()) -> ImageSize:
    """What the largest of some images of these tasks takes; without images, what one of ``SIZE`` takes.

    The base's processor is asked about a blank image. Without a processor, its family's row says what to assume.
    """
    if base.family.vicuna:
        return ImageSize(base.image_token_count, base.image_token_count, 1, "of any size")
    size = max((size for task in tasks for size in _sizes(task)), key=prod, default=SIZE)
    shown = "{} x {} pixels".format(*size)
    try:
        chat = open_encoder(config, offline=True).chat
        assert chat is not None
        blank = PIL.Image.new("RGB", size)
        whole, text = (chat.prompt_item(PROBE.question, image) for image in (blank, None))
    except ClmoeError as error:
        if base.family.assumed is None:
            raise ClmoeError(f"{error}; without a processor it is not known what an image takes") from error
        why = f"assumed, as published processors take {SIZE[0]} x {SIZE[1]} pixels, because {error}"
        return ImageSize(*base.family.assumed, why)
    pixels, tokens = whole.extra["pixel_values"], len(whole.input_ids) - len(text.input_ids)
    if pixels.dim() == 2:
        return ImageSize(tokens, len(pixels), 1, f"{shown}, by its processor")
    patch = base.model.config.vision_config.patch_size
    side = patch if isinstance(patch, int) else patch[0]
    tiles = prod(pixels.shape[:-3])
    return ImageSize(tokens, tiles * (pixels.shape[-1] // side) * (pixels.shape[-2] // side), tiles,
                     f"{shown}, by its processor")  # fmt: skip


def _sizes(task: Task) -> Iterator[tuple[int, int]]:
    """Sizes of the images of a test file's first rows, if they can be read; `clmoe data check` lists what cannot."""
    try:
        rows = read_json(task.test) if task.test.is_file() else []
    except ClmoeError:
        return
    for row in islice(rows, LOOKED_AT):
        try:
            yield size_of(task.image_root / row["image"])
        except (ClmoeError, LookupError, TypeError):
            continue
