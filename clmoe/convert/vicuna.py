"""The papers' start: a LLaMA (Vicuna), a CLIP, and the projector of LLaVA-1.5's first stage, put together.

LLaVA trains ``mm_projector.bin`` on captions with both models frozen (``pretrain_mm_mlp_adapter``). CoIN and CL-MoE
start their sequences from these three, not from a finished LLaVA-1.5.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from clmoe.convert.assemble import Parts, assemble, clip_copy, language_copy, projector_copy
from clmoe.convert.clip import open_clip
from clmoe.convert.llava_folder import Connection, open_language, read_connection
from clmoe.convert.pickles import PROJECTOR_LIMIT
from clmoe.convert.shards import Copy, open_file, open_weights
from clmoe.errors import ClmoeError
from clmoe.utils.files import read_json

if TYPE_CHECKING:
    from torch import Size


def convert_vicuna(source: Path, target: Path, vision: Path, projector: Path) -> str:
    """Write the model; returns what was put together.

    The layer and kind of the tower's features come from a config.json beside the projector, as LLaVA's first stage
    leaves one; without it they are LLaVA-1.5's (-2, patches).

    Raises:
        ClmoeError: a file is missing or does not fit.
    """
    if not projector.is_file():
        raise ClmoeError(f"--projector {projector}: no such file")
    beside = projector.with_name("config.json")
    connection = read_connection(read_json(beside), beside) if beside.is_file() else Connection()
    language, clip = open_language(source, read_json(source / "config.json")), open_clip(vision)

    def plan(work: Path, stack: ExitStack, wanted: dict[str, Size]) -> list[Copy]:
        return [
            projector_copy(open_file(projector, PROJECTOR_LIMIT, work, stack), wanted),
            language_copy(open_weights(source, work, stack), language, wanted),
            clip_copy(clip, work, stack, wanted),
        ]

    count = assemble(target, Parts(language, clip, connection), plan)
    return f"LLaMA {source} with CLIP {vision} and projector {projector}: {count} tensors"
