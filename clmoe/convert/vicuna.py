"""The papers' start: a LLaMA (Vicuna), a CLIP, and the projector of LLaVA-1.5's first stage.

LLaVA trains ``mm_projector.bin`` on captions with both models frozen (``pretrain_mm_mlp_adapter``). CoIN and CL-MoE
start their sequences from these three, not from a finished LLaVA-1.5.
"""

from pathlib import Path
from typing import Any

from clmoe.convert.weights import CLIP, LLAMA, PROJECTOR, assemble, check_connection, find_weights
from clmoe.utils.files import read_json


def convert_vicuna(source: Path, target: Path, vision: Path, projector: Path) -> str:
    """Write the model; return what was put together.

    Which of the tower's features are taken is read from a config.json beside the projector, as LLaVA's first stage
    leaves one. Without it they are LLaVA-1.5's: the patches of the last layer but one.

    Raises:
        ClmoeError: a file is missing or does not fit.
    """
    beside, connection = projector.with_name("config.json"), dict[str, Any]()
    if beside.is_file():
        connection = read_json(beside)
        check_connection(connection, beside)
    parts = [([projector], PROJECTOR), (find_weights(source), LLAMA), (find_weights(vision), CLIP)]
    count = assemble(source, target, vision, connection, parts)
    return f"LLaMA {source} with CLIP {vision} and projector {projector}: {count} tensors"
