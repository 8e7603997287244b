"""The papers' start: a LLaMA (Vicuna), a CLIP, and the projector of LLaVA-1.5's first stage.

LLaVA trains ``mm_projector.bin`` on captions with both models frozen (``pretrain_mm_mlp_adapter``). CoIN and CL-MoE
start their sequences from these three, not from a finished LLaVA-1.5.
"""

from pathlib import Path

from clmoe.convert.weights import CLIP, LLAMA, PROJECTOR, assemble, check_connection, find_weights
from clmoe.utils.files import read_json


def convert_vicuna(source: Path, target: Path, vision: Path, projector: Path) -> str:
    """Write the model; return what was put together.

    A config.json that LLaVA's first stage left beside the projector says which of the tower's features are taken;
    without one they are LLaVA-1.5's. Raises ClmoeError if a file is missing or does not fit.
    """
    beside = projector.with_name("config.json")
    connection = read_json(beside) if beside.is_file() else {"mm_projector_type": "mlp2x_gelu"}
    check_connection(connection, beside)
    parts = [([projector], PROJECTOR), (find_weights(source), LLAMA), (find_weights(vision), CLIP)]
    count = assemble(source, target, vision, connection, parts)
    return f"LLaMA {source} with CLIP {vision} and projector {projector}: {count} tensors"
