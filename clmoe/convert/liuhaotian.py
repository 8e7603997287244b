"""LLaVA-1.5 as its authors publish it (liuhaotian/llava-v1.5-7b, 13b)."""

from pathlib import Path

from clmoe.convert import weights
from clmoe.utils.files import read_json


def convert_liuhaotian(source: Path, target: Path, vision: Path) -> str:
    """Write the model; return what was found.

    The tower's weights come from the checkpoint where it has them, for it may have trained them, else from the CLIP
    folder, which says how images are scaled in either case.

    Raises:
        ClmoeError: another kind of LLaVA, or a file that is missing or does not fit.
    """
    values = read_json(source / "config.json")
    weights.check_connection(values, source / "config.json")
    files, (start,) = weights.find_weights(source), weights.LIUHAOTIAN_TOWER.values()
    if any(name.startswith(start) for name in weights.read_weights(files)):
        tower, parts = "its own vision tower", [(files, weights.LIUHAOTIAN | weights.LIUHAOTIAN_TOWER)]
    else:
        clip = (weights.find_weights(vision), weights.CLIP)
        tower, parts = f"the vision tower of {vision}", [(files, weights.LIUHAOTIAN), clip]
    count = weights.assemble(source, target, vision, values, parts)
    return f"original LLaVA {source} with {tower}: {count} tensors"
