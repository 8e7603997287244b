"""Add a checkpoint's low-rank updates to its base's files: the result needs neither clmoe nor peft.

Works on files only, one of the base's at a time. The tensors keep the names, types and places that they have there.
"""

import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from clmoe.bases.llava import base_fingerprint
from clmoe.convert.weights import open_tensors
from clmoe.errors import ClmoeError
from clmoe.experts.model import IN_FILES
from clmoe.train.checkpoint import Finished
from clmoe.utils.files import flush, read_json
from clmoe.utils.paths import resolve_model_path
from clmoe.utils.tensors import load_tensors, save_tensors

BESIDE = ("*.json", "*.jinja", "*.model", "*.txt")  # configuration, tokenizer, processor, template, index
LORA = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
EXPERTS = re.compile(r"(?P<module>.+)\.clmoe_experts\.(?P<name>\w+)\.(?:frozen_)?(?P<factor>[AB])")


def check_mergeable(done: Finished) -> None:
    """Raise ClmoeError with the reason unless the adapter is a sum of updates that is the same for every input."""
    values = read_json(done.folder / "adapter_config.json")
    if values["peft_type"] == "LORA":
        reason = next((f"{key} is set" for key in ("use_rslora", "use_dora", "rank_pattern") if values.get(key)), "")
    elif values.get("prompts"):
        reason = "its soft prompts are inputs and not weights"
    elif values["router_owners"]:
        reason = "a router weights its experts differently for every token"
    else:
        reason = "it keeps an adapter for each task" if values["pick"] == "task" else ""
    if reason:
        raise ClmoeError(f"{done.folder}: {done.config.method} cannot be merged: {reason}; export it without --merge")


def merge_checkpoint(done: Finished, target: Path) -> int:
    """Write the merged base into the new folder ``target``; returns the number of tensors that changed.

    Raises ClmoeError as ``check_mergeable`` does, and if the base is another one or does not hold what was adapted.
    """
    check_mergeable(done)
    folder = resolve_model_path(done.config.model.path)
    if base_fingerprint(folder) != done.lineage.base:
        raise ClmoeError(f"{done.folder} was trained on a different base from {done.config.model.path}")
    if not Path(folder).is_dir():
        folder = snapshot_download(folder, local_files_only=True)
    files = {path: open_tensors(path) for path in sorted(Path(folder).glob("*.safetensors"))}
    shapes = {name: tuple(tensor.shape) for tensors in files.values() for name, tensor in tensors.items()}
    updates, tuned = read_updates(done.folder)
    wanted: dict[str, tuple[int, ...]] = {name: (len(B), A.shape[1]) for name, (A, B) in updates.items()}
    wanted |= {name: tuple(tensor.shape) for name, tensor in tuned.items()}
    places = {place_in(shapes, name, shape): name for name, shape in wanted.items()}
    if len(places) < len(wanted):
        raise ClmoeError(f"{folder}: two adapted modules share a tensor there, so this base cannot be merged")
    target.mkdir(parents=True)
    for path in [path for pattern in BESIDE for path in Path(folder).glob(pattern)]:
        shutil.copy(path, target)
    for path, tensors in files.items():
        for place in tensors.keys() & places.keys():
            name, old = places[place], tensors[place]
            new = tuned[name] if name in tuned else old.float() + updates[name][1] @ updates[name][0]
            tensors[place] = new.to(old.dtype)
        save_tensors(tensors, target / path.name, {"format": "pt"})
        flush(target / path.name)
    return len(places)


def read_updates(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """What an adapter changes, by the base's parameter names: ``A [r, din]`` and ``s B [dout, r]``; whole tensors.

    LoRA (arXiv 2106.09685, section 4.1) adds ``s B A``. Experts that are all summed are one LoRA with all their ranks.
    """
    values, tensors = read_json(folder / "adapter_config.json"), load_tensors(folder / "adapter_model.safetensors")
    lora = values["peft_type"] == "LORA"
    scaling = values["lora_alpha"] / values["r"] if lora else values["scaling"]
    factors: dict[str, dict[str, list[Tensor]]] = {}
    tuned: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):  # so that A, B and frozen_A, frozen_B come in the same order
        name = key.removeprefix(IN_FILES)
        found = (LORA if lora else EXPERTS).fullmatch(name)
        if found is None:
            tuned[name] = tensor
            continue
        linear = found["module"] if lora else _linear(found["module"], found["name"])
        factors.setdefault(f"{linear}.weight", {"A": [], "B": []})[found["factor"]].append(tensor.float())
    return {name: (torch.cat(of["A"]), scaling * torch.cat(of["B"], 1)) for name, of in factors.items()}, tuned


def _linear(module: str, name: str) -> str:
    """The linear that experts adapt: the patched module itself, or one inside a patched FFN."""
    return module if module.endswith(f".{name}") else f"{module}.{name}"


def place_in(shapes: dict[str, tuple[int, ...]], name: str, shape: tuple[int, ...]) -> str:
    """The tensor in a base's files that becomes the parameter ``name``; modules above it may have other names there.

    Among the tensors of its shape, it shares the longest ending and, if several do, the most words. Raises ClmoeError
    if none or several remain.
    """
    parts = name.split(".")

    def likeness(other: str) -> tuple[int, int]:
        theirs = other.split(".")
        equal = [a == b for a, b in zip(parts[::-1], theirs[::-1], strict=False)]
        return [*equal, False].index(False), len({*parts} & {*theirs})

    ranked = sorted(((likeness(other), other) for other in shapes if shapes[other] == shape), reverse=True)
    best = [other for found, other in ranked if found == ranked[0][0]]
    if len(best) != 1 or ranked[0][0][0] < 2:
        raise ClmoeError(f"the base's files hold no tensor that is clearly {name}: {best[:2] or 'none of its shape'}")
    return best[0]
