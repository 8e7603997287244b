"""Put a LLaVA together from its three parts, wherever their weights come from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clmoe.convert.clip import UNUSED, Clip
from clmoe.convert.llava_folder import (
    LANGUAGE,
    PROJECTOR,
    Connection,
    Language,
    building,
    llava_config,
    save_rest,
    source_names,
    wanted_tensors,
    widen,
)
from clmoe.convert.shards import Copy, ShardWriter, Weights, open_weights

if TYPE_CHECKING:
    from torch import Size

CLIP_TOWER = (("vision_tower.vision_model.", "vision_model."),)
LLAVA_TOWER = (("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),)
"""(beginning of the tower's names in our folder, in a CLIP's or an original LLaVA's files)"""


@dataclass(frozen=True)
class Parts:
    """What is known of a model before its weights are opened."""

    language: Language
    clip: Clip
    connection: Connection


Plan = Callable[[Path, ExitStack, dict[str, "Size"]], list[Copy]]
"""Scratch folder, what to close at the end, name -> shape of all tensors -> the copies that make the model."""


def assemble(target: Path, parts: Parts, plan: Plan) -> int:
    """Write the model's folder; returns its number of tensors.

    All names are compared before the first tensor is copied, and after the last one the written files are read back.

    Raises:
        ClmoeError: the target exists, or a tensor is missing, unknown, or of another shape or kind than needed.
    """
    config = llava_config(parts.language, parts.clip, parts.connection)
    wanted = wanted_tensors(config)
    with building(target) as work:
        with ExitStack() as stack:
            copies = plan(work, stack, wanted)
            for copy in copies:
                copy.check()
            writer = ShardWriter(work, wanted)
            for copy in copies:
                copy.run(writer, work)
        writer.finish()
        save_rest(work, config, parts.language, parts.clip)
    return len(wanted)


def language_copy(weights: Weights, language: Language, wanted: dict[str, Size]) -> Copy:
    """A LLaMA's own names; embeddings and head get the rows of the two new tokens."""
    return Copy(weights, source_names(wanted, LANGUAGE), change=partial(widen, language))


def clip_copy(clip: Clip, work: Path, stack: ExitStack, wanted: dict[str, Size]) -> Copy:
    """The tower of a CLIP folder; the text side is left out."""
    assert clip.folder is not None
    return Copy(open_weights(clip.folder, work, stack), source_names(wanted, CLIP_TOWER), ignored=UNUSED)


def projector_copy(weights: Weights, wanted: dict[str, Size]) -> Copy:
    """``model.mm_projector.{0,2}.{weight,bias}`` alone."""
    return Copy(weights, source_names(wanted, PROJECTOR))
