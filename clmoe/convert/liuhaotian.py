"""LLaVA-1.5 as its authors publish it (liuhaotian/llava-v1.5-7b, 13b)."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from clmoe.convert.assemble import LLAVA_TOWER, Parts, assemble, clip_copy, language_copy
from clmoe.convert.clip import known_tower, open_clip
from clmoe.convert.llava_folder import PROJECTOR, open_language, read_connection, source_names
from clmoe.convert.shards import Copy, open_weights
from clmoe.errors import ClmoeError
from clmoe.utils.files import read_json

if TYPE_CHECKING:
    from torch import Size

OWN_TOWER = LLAVA_TOWER[0][1]


def convert_liuhaotian(source: Path, target: Path, vision: Path | None) -> str:
    """Write the model; returns what was found.

    The tower's weights are those in the checkpoint where it has them (it may have trained them), else those of the CLIP
    folder. Without ``vision`` the tower must be in the checkpoint, and of the kind that LLaVA-1.5 uses.

    Raises:
        ClmoeError: no tower anywhere, another kind of LLaVA, or a file that does not fit.
    """
    where = source / "config.json"
    values = read_json(where)
    connection = read_connection(values, where)
    language = open_language(source, values)
    clip = open_clip(vision) if vision is not None else known_tower(str(values.get("mm_vision_tower")))
    found = []

    def plan(work: Path, stack: ExitStack, wanted: dict[str, Size]) -> list[Copy]:
        weights = open_weights(source, work, stack)
        llava = language_copy(weights, language, wanted)
        llava.names.update(source_names(wanted, PROJECTOR))
        if any(name.startswith(OWN_TOWER) for name in weights.listed):
            found.append("its own vision tower")
            llava.names.update(source_names(wanted, LLAVA_TOWER))
            return [llava]
        if clip.folder is None:
            raise ClmoeError(
                f"{source} holds no vision tower: give the folder of {values['mm_vision_tower']} as --vision"
            )
        found.append(f"the vision tower of {clip.folder}")
        return [llava, clip_copy(clip, work, stack, wanted)]

    count = assemble(target, Parts(language, clip, connection), plan)
    return f"original LLaVA {source} with {found[0]}: {count} tensors"
